//! The state of the cluster as nftlet sees it.
