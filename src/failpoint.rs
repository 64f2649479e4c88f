//! Points at which tests and campaigns stop it, break it or end it. A plain build has none of them.

/// As `fail::fail_point!`: by `FAILPOINTS="<name>=<action>"` in the environment, or by `fail::cfg` from within, this point
/// does something; otherwise nothing. Points that end the process take the action `return`.
#[cfg(feature = "failpoints")]
macro_rules! fail_point {
    ($($point:tt)*) => { fail::fail_point!($($point)*) };
}

#[cfg(not(feature = "failpoints"))]
macro_rules! fail_point {
    ($($point:tt)*) => {};
}
