//! Loads the values of selectors into registers.

use nftnl::nftnl_sys as sys;

use super::{Attribute, Expr, Program, register};
use crate::nft::{Selector, TableFamily};

impl Program {
    /// Loads a selector's value into the register at a word.
    pub(super) fn load(&mut self, selector: Selector, word: usize) {
        let target = register(word);
        match selector {
            Selector::SourceAddress | Selector::DestinationAddress => {
                let (source, length) = match self.family {
                    TableFamily::Ip => (12, 4),
                    TableFamily::Ip6 => (8, 16),
                };
                let offset = match selector {
                    Selector::SourceAddress => source,
                    _ => source + length,
                };
                self.payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, length, target);
            }
            Selector::DestinationPort => {
                self.payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, target);
            }
            Selector::L4Protocol => self.meta(libc::NFT_META_L4PROTO, target),
            Selector::Priority => self.meta(libc::NFT_META_PRIORITY, target),
            Selector::InputInterface => self.meta(libc::NFT_META_IIFNAME, target),
            Selector::OutputInterface => self.meta(libc::NFT_META_OIFNAME, target),
            Selector::OriginalDestinationAddress => {
                let key = match self.family {
                    TableFamily::Ip => libc::NFT_CT_DST_IP,
                    TableFamily::Ip6 => libc::NFT_CT_DST_IP6,
                };
                self.ct(key, Some(0), target);
            }
            Selector::OriginalDestinationPort => {
                self.ct(libc::NFT_CT_PROTO_DST, Some(0), target);
            }
            Selector::Icmp6Type => {
                self.payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 0, 1, target);
            }
        }
    }

    /// Loads the fields of a key into consecutive registers, beginning at a word, and returns the word
    /// after them.
    pub(super) fn load_key(&mut self, selectors: &[Selector], first: usize) -> usize {
        let mut word = first;
        for selector in selectors {
            self.load(*selector, word);
            word += selector.field_type(self.family).padded_len() / 4;
        }
        word
    }

    pub(super) fn payload(&mut self, base: libc::c_int, offset: u32, length: u32, target: u32) {
        use Attribute::U32;
        self.push(
            c"payload",
            [
                (sys::NFTNL_EXPR_PAYLOAD_DREG, U32(target)),
                (sys::NFTNL_EXPR_PAYLOAD_BASE, U32(base as u32)),
                (sys::NFTNL_EXPR_PAYLOAD_OFFSET, U32(offset)),
                (sys::NFTNL_EXPR_PAYLOAD_LEN, U32(length)),
            ],
        );
    }

    pub(super) fn meta(&mut self, key: libc::c_int, target: u32) {
        use Attribute::U32;
        self.push(
            c"meta",
            [
                (sys::NFTNL_EXPR_META_KEY, U32(key as u32)),
                (sys::NFTNL_EXPR_META_DREG, U32(target)),
            ],
        );
    }

    pub(super) fn ct(&mut self, key: libc::c_int, direction: Option<u8>, target: u32) {
        use Attribute::{U8, U32};
        let mut attributes = vec![
            (sys::NFTNL_EXPR_CT_KEY, U32(key as u32)),
            (sys::NFTNL_EXPR_CT_DREG, U32(target)),
        ];
        if let Some(direction) = direction {
            attributes.push((sys::NFTNL_EXPR_CT_DIR, U8(direction)));
        }
        self.exprs.push(Expr {
            name: c"ct",
            attributes,
        });
    }
}
