//! A stored record: read or refused; what is read is written as it was; nothing without our key's seal opens.

use adsidecar::domain::account::UserId;
use adsidecar::domain::secret::Secret;
use adsidecar::store::keyring::Keyring;
use adsidecar::store::stored_grant::StoredGrant;

pub fn check(json: &[u8]) {
    let keyring = Keyring::new(&[Secret::new("cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=")]).unwrap();
    let user: UserId = "fuzz".parse().unwrap();
    if let Ok(value) = serde_json::from_slice::<serde_json::Value>(json)
        && let Ok(grant) = StoredGrant::import(value, &user, &keyring)
    {
        // Whatever could be imported can be stored, and comes back the same.
        let stored = StoredGrant::seal(&grant, &user, &keyring).to_json();
        let again = StoredGrant::parse(&stored).unwrap().open(&user, &keyring).unwrap();
        assert_eq!(again.refresh_token, grant.refresh_token);
        assert_eq!(again.generation, grant.generation);
        let other: UserId = "other".parse().unwrap();
        assert!(StoredGrant::parse(&stored).unwrap().open(&other, &keyring).is_err());
    }
    if let Ok(record) = StoredGrant::parse(json) {
        let written = record.to_json();
        assert_eq!(StoredGrant::parse(&written).unwrap().to_json(), written);
        assert!(record.open(&user, &keyring).is_err(), "nobody without the key makes a seal");
        let _ = record.key_index(&keyring);
    }
}
