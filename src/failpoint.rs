//! Points at which tests and campaigns stop it, break it or end it. A plain build has none of them.
//!
//! `renewal_begun`, `renewal_answered` and `renewal_stored` lie around a renewal, `save_refused`, `save_unsynced` and
//! `save_synced` around its way to the disk; those that end the process take the action `return`. `renewal_blind`,
//! `flights_many`, `intents_none` and `clock_wall_alone` each take a promise away (a logout beats a refresh, one renewal at a
//! time, a lost grant is reported, every clock counts), so that a campaign can show that it would notice.

/// As `fail::fail_point!`: by `FAILPOINTS="<name>=<action>"` in the environment, or by `fail::cfg` from within, this point
/// does something; otherwise nothing.
#[cfg(feature = "failpoints")]
macro_rules! fail_point {
    ($($point:tt)*) => { fail::fail_point!($($point)*) };
}

#[cfg(not(feature = "failpoints"))]
macro_rules! fail_point {
    ($($point:tt)*) => {};
}
