//! Who owns a contested frontend.
