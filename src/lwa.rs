//! Login with Amazon: exchange a code, refresh a grant.

use rustls::pki_types::CertificateDer;
use url::Url;

use crate::account::Region;
use crate::secret::Secret;

/// Where the token endpoint is and who we are to it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `amazon.client_id`.
    pub client_id: String,
    /// `amazon.client_secret`: tried in order.
    pub client_secrets: Vec<Secret>,
    /// `amazon.redirect_uri`, byte for byte as configured.
    pub redirect_uri: String,
    /// `amazon.scope`: separated by spaces.
    pub scope: String,
    /// `amazon.region`: whose token host is asked, since codes and tokens are global.
    pub region: Region,
    /// `amazon.authorize_url`, where it replaces the region's own.
    pub authorize_url: Option<Url>,
    /// `amazon.token_url`, where it replaces the region's own.
    pub token_url: Option<Url>,
    /// `amazon.ca_file`: extra trust roots.
    pub extra_roots: Vec<CertificateDer<'static>>,
}
