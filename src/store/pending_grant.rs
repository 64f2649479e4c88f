//! Pending grants: obtained from Amazon, stored, and not in use yet.
//!
//! The authorization code of a pending grant is spent, so it has to survive a restart. It is sealed as a whole: write
//! access to the store must not be enough to bring a pending grant into use.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::domain::account::UserId;
use crate::domain::grant::Grant;
use crate::store::keyring::Keyring;
use crate::store::stored_grant::StoredGrant;

/// A grant that is not in use until it has been compared with the user's current grant, or until the app has confirmed
/// it.
#[derive(Clone, Debug)]
pub struct PendingGrant {
    /// Hash of the one-time id, in hexadecimal digits.
    pub id: String,
    /// The user that the grant is for.
    pub user: UserId,
    /// When the grant became pending.
    pub since: Timestamp,
    /// Whether the grant may replace one of another Amazon identity.
    pub replace: bool,
    /// Whether the app still has to confirm the grant.
    pub confirm: bool,
    /// The grant itself.
    pub grant: Grant,
}

/// The plaintext of a stored pending grant.
#[derive(Serialize, Deserialize)]
struct Plaintext {
    id: String,
    user: UserId,
    since: Timestamp,
    replace: bool,
    confirm: bool,
    record: StoredGrant,
}

impl PendingGrant {
    /// Encrypts the pending grant as one Fernet token.
    pub(super) fn seal(&self, keyring: &Keyring) -> String {
        let Self { id, user, since, replace, confirm, grant } = self.clone();
        let record = StoredGrant::seal(&grant, &user, keyring);
        let plain = serde_json::to_vec(&Plaintext { id, user, since, replace, confirm, record });
        keyring.seal(&plain.expect("names, times and texts are JSON"))
    }

    /// Decrypts what [`seal`](Self::seal) returned; `None` if no key opens it or its content is malformed.
    pub(super) fn open(text: &str, keyring: &Keyring) -> Option<Self> {
        let Plaintext { id, user, since, replace, confirm, record } =
            serde_json::from_slice(&keyring.open(text)?.plain).ok()?;
        let grant = record.open(&user, keyring).ok()?;
        Some(Self { id, user, since, replace, confirm, grant })
    }
}
