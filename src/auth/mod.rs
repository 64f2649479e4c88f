//! Login with Amazon (LWA): logins, the tokens that come of them, and the client that talks to the token endpoint.

pub mod login;
pub mod tokens;
pub mod lwa;
