//! Pure types and decisions: nothing in this module does I/O.

pub mod headers;
pub mod api_families;
pub mod grant;
pub mod clock;
pub mod clock_reading;
pub mod found_account;
pub mod account;
pub mod policy;
#[cfg(test)]
mod published;
pub mod credential;
pub mod tls;
pub mod secret;
pub mod throttle_mode;
