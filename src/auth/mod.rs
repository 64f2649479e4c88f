//! Login with Amazon (LWA): logins, access tokens and their refresh, and the client of the token endpoint.

pub mod accounts;
pub mod login;
pub mod tokens;
pub mod lwa;
