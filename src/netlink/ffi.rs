//! Builds and parses messages with libnftnl.
//!
//! Functions take and return plain values. No libnftnl object outlives the function that allocated
//! it, which excludes double frees and use after free.

#![allow(unsafe_code)]

use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::NonNull;

use nftnl::expr::Expression;
use nftnl::nftnl_sys as sys;
use nftnl::{Chain, ChainType, Hook, MsgType, NlMsg, Policy, ProtoFamily, Rule, Table};

use super::expr::{Attribute, Expr};
use super::message::{AttrWriter, set_length};
use super::uapi;
use crate::nft::{BaseChain, ChainKind, Hook as ChainHook, TableFamily};

/// A buffer for one message of libnftnl, which does not check sizes.
pub(crate) struct Scratch(Vec<u64>);

impl Scratch {
    /// Allocates a buffer for the largest message that libnftnl builds.
    pub(crate) fn new() -> Self {
        let bytes = nftnl::nft_nlmsg_maxsize() as usize;
        // Words, because the header at the beginning must be aligned.
        Self(vec![0; bytes.div_ceil(size_of::<u64>())])
    }

    /// Builds a message and returns its bytes.
    fn message<T: NlMsg>(&mut self, message: &T, seq: u32, kind: MsgType) -> &mut [u8] {
        let start = self.0.as_mut_ptr().cast::<c_void>();
        // SAFETY: the buffer has nft_nlmsg_maxsize() bytes, which is what write() asks for.
        unsafe { message.write(start, seq, kind) };
        self.written()
    }

    /// Returns the message in the buffer.
    fn written(&mut self) -> &mut [u8] {
        let start = self.0.as_mut_ptr().cast::<u8>();
        let capacity = self.0.len() * size_of::<u64>();
        // SAFETY: the buffer is initialised and aligned, and a header fits into it.
        let length = unsafe { (*start.cast::<libc::nlmsghdr>()).nlmsg_len } as usize;
        // SAFETY: the range is within the buffer, which is borrowed for the result's lifetime.
        unsafe { std::slice::from_raw_parts_mut(start, length.min(capacity)) }
    }
}

/// Converts a name; `None` if it contains a zero byte.
pub(crate) fn c_name(name: &str) -> Option<CString> {
    CString::new(name).ok()
}

fn proto(family: TableFamily) -> ProtoFamily {
    match family {
        TableFamily::Ip => ProtoFamily::Ipv4,
        TableFamily::Ip6 => ProtoFamily::Ipv6,
    }
}

/// Builds a message that creates or deletes a table.
pub(crate) fn table(
    scratch: &mut Scratch,
    family: TableFamily,
    name: &CStr,
    kind: MsgType,
) -> Vec<u8> {
    let table = Table::new(name, proto(family));
    scratch.message(&table, 0, kind).to_vec()
}

/// Builds a message that creates or deletes a chain.
pub(crate) fn chain(
    scratch: &mut Scratch,
    (family, table): (TableFamily, &CStr),
    name: &CStr,
    base: Option<&BaseChain>,
    kind: MsgType,
) -> Vec<u8> {
    let table = Table::new(table, proto(family));
    let mut chain = Chain::new(name, &table);
    if let Some(base) = base {
        chain.set_type(match base.kind {
            ChainKind::Filter => ChainType::Filter,
            ChainKind::Nat => ChainType::Nat,
        });
        let hook = match base.hook {
            ChainHook::Prerouting => Hook::PreRouting,
            ChainHook::Input => Hook::In,
            ChainHook::Forward => Hook::Forward,
            ChainHook::Output => Hook::Out,
            ChainHook::Postrouting => Hook::PostRouting,
        };
        chain.set_hook(hook, base.priority);
        chain.set_policy(Policy::Accept);
    }
    scratch.message(&chain, 0, kind).to_vec()
}

/// Builds a message that appends a rule or, with [`MsgType::Del`] and no expressions, removes all rules
/// of the chain.
pub(crate) fn rule(
    scratch: &mut Scratch,
    (family, table, chain): (TableFamily, &CStr, &CStr),
    exprs: &[Expr],
    user_data: &[u8],
    kind: MsgType,
) -> Vec<u8> {
    let table = Table::new(table, proto(family));
    let chain = Chain::new(chain, &table);
    let mut rule = Rule::new(&chain);
    for expr in exprs {
        rule.add_expr(expr);
    }
    let mut message = scratch.message(&rule, 0, kind).to_vec();
    if !user_data.is_empty() {
        // Simpler than the crate's set_comment, which needs a mutable rule and a C string.
        AttrWriter::new(&mut message).bytes(uapi::NFTA_RULE_USERDATA, user_data);
        set_length(&mut message);
    }
    message
}

/// The attributes of a set declaration.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SetAttributes {
    /// `NFTA_SET_FLAGS`.
    pub flags: u32,
    /// `NFTA_SET_KEY_TYPE`, which only nft interprets.
    pub key_type: u32,
    /// `NFTA_SET_KEY_LEN` in bytes.
    pub key_len: u32,
    /// `NFTA_SET_DATA_TYPE` and `NFTA_SET_DATA_LEN` in bytes.
    pub data: Option<(u32, u32)>,
    /// `NFTA_SET_TIMEOUT` in milliseconds.
    pub timeout: Option<u64>,
    /// `NFTA_SET_DESC_SIZE`.
    pub size: Option<u32>,
    /// Lengths of the fields of a concatenated interval key.
    pub fields: Vec<u8>,
    /// `NFTA_SET_USERDATA`.
    pub user_data: Vec<u8>,
    /// The name of the expression in `NFTA_SET_EXPR`, which each element has a copy of.
    pub expression: Option<Cow<'static, str>>,
}

/// Builds a message that declares a set.
pub(crate) fn new_set(
    scratch: &mut Scratch,
    (family, table): (TableFamily, &CStr),
    name: &CStr,
    id: u32,
    set: &SetAttributes,
) -> Vec<u8> {
    let buffer = scratch.0.as_mut_ptr().cast::<c_char>();
    // SAFETY: the object is checked for null, used only in this block and freed at its end;
    // names are zero-terminated; lengths are those of the slices they go with; the message is
    // written into a buffer of nft_nlmsg_maxsize() bytes.
    unsafe {
        let object = sys::nftnl_set_alloc();
        if object.is_null() {
            std::process::abort();
        }
        let u32_attr = |kind: u32, value: u32| {
            sys::nftnl_set_set_u32(object, kind as u16, value);
        };
        let data_attr = |kind: u32, value: &[u8]| {
            sys::nftnl_set_set_data(
                object,
                kind as u16,
                value.as_ptr().cast::<c_void>(),
                value.len() as u32,
            );
        };
        sys::nftnl_set_set_str(object, sys::NFTNL_SET_TABLE as u16, table.as_ptr());
        sys::nftnl_set_set_str(object, sys::NFTNL_SET_NAME as u16, name.as_ptr());
        u32_attr(sys::NFTNL_SET_FAMILY, proto(family) as u32);
        u32_attr(sys::NFTNL_SET_ID, id);
        u32_attr(sys::NFTNL_SET_FLAGS, set.flags);
        u32_attr(sys::NFTNL_SET_KEY_TYPE, set.key_type);
        u32_attr(sys::NFTNL_SET_KEY_LEN, set.key_len);
        if let Some((kind, length)) = set.data {
            u32_attr(sys::NFTNL_SET_DATA_TYPE, kind);
            u32_attr(sys::NFTNL_SET_DATA_LEN, length);
        }
        if let Some(timeout) = set.timeout {
            sys::nftnl_set_set_u64(object, sys::NFTNL_SET_TIMEOUT as u16, timeout);
        }
        if let Some(size) = set.size {
            u32_attr(sys::NFTNL_SET_DESC_SIZE, size);
        }
        if !set.fields.is_empty() {
            data_attr(sys::NFTNL_SET_DESC_CONCAT, &set.fields);
        }
        data_attr(sys::NFTNL_SET_USERDATA, &set.user_data);
        let header = sys::nftnl_nlmsg_build_hdr(
            buffer,
            libc::NFT_MSG_NEWSET as u16,
            proto(family) as u16,
            libc::NLM_F_CREATE as u16,
            0,
        );
        sys::nftnl_set_nlmsg_build_payload(header, object);
        sys::nftnl_set_free(object);
    }
    let mut message = scratch.written().to_vec();
    if let Some(expression) = &set.expression {
        let mut writer = AttrWriter::new(&mut message);
        let nest = writer.begin(uapi::NFTA_SET_EXPR);
        writer.string(uapi::NFTA_EXPR_NAME, expression);
        // A counter that starts at zero needs an empty list of attributes.
        let data = writer.begin(uapi::NFTA_EXPR_DATA);
        writer.end(data);
        writer.end(nest);
        set_length(&mut message);
    }
    message
}

impl Expression for Expr {
    fn to_expr(&self, _rule: &Rule) -> NonNull<sys::nftnl_expr> {
        // SAFETY: the name is zero-terminated; the object is checked for null and handed to the
        // caller, which frees it with its rule; libnftnl copies all values given here.
        unsafe {
            let Some(object) = NonNull::new(sys::nftnl_expr_alloc(self.name.as_ptr())) else {
                std::process::abort();
            };
            for (kind, value) in &self.attributes {
                let (expr, kind) = (object.as_ptr(), *kind as u16);
                match value {
                    Attribute::U8(value) => sys::nftnl_expr_set_u8(expr, kind, *value),
                    Attribute::U16(value) => sys::nftnl_expr_set_u16(expr, kind, *value),
                    Attribute::U32(value) => sys::nftnl_expr_set_u32(expr, kind, *value),
                    Attribute::U64(value) => sys::nftnl_expr_set_u64(expr, kind, *value),
                    Attribute::Text(name) => {
                        // Names were checked for zero bytes when the chain or set was encoded.
                        let name = c_name(name.as_str()).unwrap_or_default();
                        sys::nftnl_expr_set_str(expr, kind, name.as_ptr());
                    }
                    Attribute::Bytes(bytes) => {
                        let data = bytes.as_ptr().cast::<c_void>();
                        sys::nftnl_expr_set(expr, kind, data, bytes.len() as u32);
                    }
                }
            }
            object
        }
    }
}

/// Sets the attributes that the kernel adds by itself or that change with traffic, so that a
/// written expression equals the one read back.
///
/// # Safety
///
/// `expr` must point to a live expression of that name.
unsafe fn normalise(name: &CStr, expr: *mut sys::nftnl_expr) {
    // NF_NAT_RANGE_MAP_IPS and NF_NAT_RANGE_PROTO_SPECIFIED, which follow from the registers.
    const NAT_RANGE: u32 = 3;
    // SAFETY: the caller guarantees a live expression; attribute numbers are those of its name.
    unsafe {
        let get = |kind: u32| {
            let set = sys::nftnl_expr_is_set(expr, kind as u16);
            set.then(|| sys::nftnl_expr_get_u32(expr, kind as u16))
        };
        let put = |kind: u32, value: u32| sys::nftnl_expr_set_u32(expr, kind as u16, value);
        if name == c"counter" {
            sys::nftnl_expr_set_u64(expr, sys::NFTNL_EXPR_CTR_PACKETS as u16, 0);
            sys::nftnl_expr_set_u64(expr, sys::NFTNL_EXPR_CTR_BYTES as u16, 0);
        } else if name == c"lookup" {
            let flags = get(sys::NFTNL_EXPR_LOOKUP_FLAGS).unwrap_or_default();
            put(sys::NFTNL_EXPR_LOOKUP_FLAGS, flags);
        } else if name == c"nat" {
            for (low, high) in [
                (
                    sys::NFTNL_EXPR_NAT_REG_ADDR_MIN,
                    sys::NFTNL_EXPR_NAT_REG_ADDR_MAX,
                ),
                (
                    sys::NFTNL_EXPR_NAT_REG_PROTO_MIN,
                    sys::NFTNL_EXPR_NAT_REG_PROTO_MAX,
                ),
            ] {
                if let (Some(register), None) = (get(low), get(high)) {
                    put(high, register);
                }
            }
            let flags = get(sys::NFTNL_EXPR_NAT_FLAGS).unwrap_or_default();
            put(sys::NFTNL_EXPR_NAT_FLAGS, flags | NAT_RANGE);
        }
    }
}

/// Returns the expressions of a rule message in libnftnl's notation with counters set to zero, which
/// is equal for a written rule and the one read back. `None` if libnftnl cannot parse it.
pub(crate) fn describe_rule(message: &[u8]) -> Option<String> {
    if message.len() < size_of::<libc::nlmsghdr>() {
        return None;
    }
    // Copied to words, because libnftnl reads the header in place and it must be aligned.
    let mut words = vec![0u64; message.len().div_ceil(size_of::<u64>())];
    // SAFETY: the destination has at least as many bytes as the source; they do not overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(
            message.as_ptr(),
            words.as_mut_ptr().cast::<u8>(),
            message.len(),
        );
    }
    let header = words.as_ptr().cast::<libc::nlmsghdr>();
    let mut text = String::new();
    // SAFETY: the header is aligned and followed by the whole message; the objects are checked
    // for null, used only here and freed on all paths; the text buffer's length is passed on.
    unsafe {
        if (*header).nlmsg_len as usize > message.len() {
            return None;
        }
        let rule = sys::nftnl_rule_alloc();
        if rule.is_null() {
            std::process::abort();
        }
        if sys::nftnl_rule_nlmsg_parse(header, rule) < 0 {
            sys::nftnl_rule_free(rule);
            return None;
        }
        let iterator = sys::nftnl_expr_iter_create(rule);
        if iterator.is_null() {
            std::process::abort();
        }
        loop {
            let expr = sys::nftnl_expr_iter_next(iterator);
            if expr.is_null() {
                break;
            }
            let name = sys::nftnl_expr_get_str(expr, sys::NFTNL_EXPR_NAME as u16);
            if !name.is_null() {
                normalise(CStr::from_ptr(name), expr);
            }
            let mut line = [0u8; 1024];
            sys::nftnl_expr_snprintf(
                line.as_mut_ptr().cast::<c_char>(),
                line.len(),
                expr,
                sys::NFTNL_OUTPUT_DEFAULT,
                0,
            );
            if let Ok(line) = CStr::from_bytes_until_nul(&line) {
                if !name.is_null() {
                    text.push_str(&CStr::from_ptr(name).to_string_lossy());
                    text.push(' ');
                }
                text.push_str(line.to_string_lossy().trim());
                text.push_str("; ");
            }
        }
        sys::nftnl_expr_iter_destroy(iterator);
        sys::nftnl_rule_free(rule);
    }
    Some(text)
}
