//! What every store guarantees: sled, PostgreSQL, and PostgreSQL behind a PgBouncer in transaction mode.

use std::sync::Arc;

use adsidecar::domain::account::UserId;
use adsidecar::domain::grant::{Access, AccessToken, Grant, RefreshToken};
use adsidecar::domain::secret::Secret;
use adsidecar::store::keyring::Keyring;
use adsidecar::store::{ConnectionUrl, Opened, PendingGrant, Sealed, Settings, StoreError, TokenStore};
use jiff::{SignedDuration, Timestamp};
use tempfile::TempDir;

use crate::postgres_server::{Bouncer, Cluster};

pub fn user(name: &str) -> UserId {
    name.parse().unwrap()
}

pub fn grant(text: &str, generation: u64) -> Grant {
    let updated_at: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    Grant {
        refresh_token: RefreshToken::new(format!("Atzr|{text}")).unwrap(),
        previous: None,
        access: Some(Access {
            token: AccessToken::new(format!("Atza|{text}")).unwrap(),
            expires_at: updated_at + SignedDuration::from_hours(1),
        }),
        updated_at,
        consented_at: None,
        used_at: None,
        scope: None,
        generation,
    }
}

pub fn ring(keys: &[&Secret]) -> Arc<Keyring> {
    let keys: Vec<_> = keys.iter().map(|key| (*key).clone()).collect();
    Arc::new(Keyring::new(&keys).unwrap())
}

pub fn open(settings: &Settings, keyring: &Arc<Keyring>) -> Result<(TokenStore, Opened), StoreError> {
    TokenStore::open(settings, keyring.clone())
}

async fn refresh_token(store: &TokenStore, name: &str) -> Option<String> {
    let grant = store.load(&user(name)).await.unwrap();
    grant.map(|grant| grant.refresh_token.secret().expose().to_owned())
}

/// Each store, empty, with its name.
struct Stores {
    directory: TempDir,
    cluster: Cluster,
    bouncer: Bouncer,
}

impl Stores {
    fn new() -> Self {
        let cluster = Cluster::start();
        let bouncer = Bouncer::before(&cluster, 3);
        Self { directory: TempDir::new().unwrap(), cluster, bouncer }
    }

    async fn empty(&self) -> Vec<(&'static str, Settings)> {
        let tables = "adsidecar_grants, adsidecar_logins, adsidecar_waiting, adsidecar_notes";
        self.cluster.connect().await.run(&format!("DROP TABLE IF EXISTS {tables}")).await;
        let settings = |url: Option<String>| Settings {
            path: self.directory.path().join("store"),
            postgres: url.map(|url| ConnectionUrl::parse(&url).unwrap()),
        };
        let behind = settings(Some(self.bouncer.url()));
        vec![("sled", settings(None)), ("postgres", settings(Some(self.cluster.url()))), ("pgbouncer", behind)]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_store_keeps_its_records_and_rejects_superseded_writes() {
    let stores = Stores::new();
    let key = Keyring::generate_key();
    for at in 0..3 {
        let (kind, settings) = stores.empty().await.swap_remove(at);
        let (store, opened) = open(&settings, &ring(&[&key])).unwrap();
        assert!(opened.users.is_empty(), "{kind}");
        let anna = user("anna");
        assert!(matches!(store.save(&anna, &grant("x", 2), Some(1)).await, Err(StoreError::Conflict)), "{kind}");
        assert_eq!(refresh_token(&store, "anna").await, None, "{kind}");
        let one = store.save(&anna, &grant("one", 1), None).await.unwrap();
        let two = store.save(&anna, &grant("two", one + 1), Some(one)).await.unwrap();
        assert_eq!(two, one + 1, "{kind}");
        // Writing twice has the effect of writing once: the first response may have been lost.
        assert_eq!(store.save(&anna, &grant("two", two), Some(one)).await.unwrap(), two, "{kind}");
        for other in [grant("other", two), grant("two", two + 1)] {
            let error = store.save(&anna, &other, Some(one)).await.unwrap_err();
            assert!(matches!(error, StoreError::Conflict), "{kind}: {error}");
        }
        assert_eq!(refresh_token(&store, "anna").await.as_deref(), Some("Atzr|two"), "{kind}");
        store.save(&user("bob"), &grant("bob", 1), None).await.unwrap();
        let names: Vec<_> = store.scan().await.unwrap().into_iter().map(|(user, _)| user.to_string()).collect();
        assert_eq!(names, ["anna", "bob"], "{kind}");
        let dump = store.dump().await.unwrap();
        assert!(dump[&anna]["refresh_token"].as_str().unwrap().starts_with("gAAAA"), "{kind}");

        assert!(store.erase(&anna).await.unwrap(), "{kind}");
        assert!(!store.erase(&anna).await.unwrap(), "{kind}: the grant exists only once");
        assert!(!store.erase(&user("nobody")).await.unwrap(), "{kind}");
        let late = store.save(&anna, &grant("late", two + 1), Some(two)).await;
        assert!(matches!(late, Err(StoreError::Conflict)), "{kind}: a logout supersedes a late write");
        assert_eq!(refresh_token(&store, "anna").await, None, "{kind}");

        store.set_note("adopted_refresh_token", "a").await.unwrap();
        store.set_note("adopted_refresh_token", "b").await.unwrap();
        assert_eq!(store.note("adopted_refresh_token").await.unwrap().as_deref(), Some("b"), "{kind}");
        assert_eq!(store.note("rotation").await.unwrap(), None, "{kind}");
        store.close().await.unwrap();
        assert!(matches!(store.load(&anna).await, Err(StoreError::Closed)), "{kind}");
        let (store, opened) = open(&settings, &ring(&[&key])).unwrap();
        let found: Vec<_> = opened.users.iter().map(|(user, grant)| (user.as_str(), grant.is_ok())).collect();
        assert_eq!(found, [("bob", true)], "{kind}");
        store.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_store_adopts_new_keys_and_reseals_with_the_first() {
    let stores = Stores::new();
    let (old, new) = (Keyring::generate_key(), Keyring::generate_key());
    for at in 0..3 {
        let (kind, settings) = stores.empty().await.swap_remove(at);
        let (store, _) = open(&settings, &ring(&[&old])).unwrap();
        for name in ["anna", "bob"] {
            store.save(&user(name), &grant(name, 1), None).await.unwrap();
        }
        let refused = store.rekey(ring(&[&new])).await.unwrap_err();
        assert!(matches!(refused, StoreError::WrongKey { expected: Some(_), .. }), "{kind}: {refused}");
        let both = ring(&[&new, &old]);
        store.rekey(both.clone()).await.unwrap();
        assert_eq!(store.health().under_other_keys(both.first()), 2, "{kind}");
        store.save(&user("bob"), &grant("bob2", 2), None).await.unwrap();
        let done = store.reseal().await.unwrap();
        assert_eq!((done.resealed, done.unreadable), (1, 0), "{kind}");
        assert_eq!(store.reseal().await.unwrap().resealed, 0, "{kind}: nothing is left to reseal");
        assert_eq!(store.health().records, [(Sealed::By(both.first()), 2)].into(), "{kind}");
        store.close().await.unwrap();

        let error = open(&settings, &ring(&[&old])).unwrap_err();
        let StoreError::WrongKey { expected, .. } = &error else { panic!("{kind}: {error}") };
        assert_eq!(*expected, Some(both.first()), "{kind}");
        let (store, opened) = open(&settings, &ring(&[&new])).unwrap();
        assert!(opened.users.iter().all(|(_, grant)| grant.is_ok()), "{kind}");
        assert_eq!(refresh_token(&store, "bob").await.as_deref(), Some("Atzr|bob2"), "{kind}");
        store.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_store_keeps_pending_grants_until_dropped_or_logout() {
    let stores = Stores::new();
    let key = Keyring::generate_key();
    for at in 0..3 {
        let (kind, settings) = stores.empty().await.swap_remove(at);
        let (store, _) = open(&settings, &ring(&[&key])).unwrap();
        let waiting = |id: &str, name: &str| PendingGrant {
            id: id.to_owned(),
            user: user(name),
            since: Timestamp::now(),
            replace: false,
            confirm: true,
            grant: grant(name, 0),
        };
        for (id, name) in [("1", "anna"), ("2", "anna"), ("3", "bob"), ("4", "bob")] {
            store.save_pending_grant(&waiting(id, name)).await.unwrap();
        }
        store.erase(&user("anna")).await.unwrap();
        store.delete_pending_grant("3").await.unwrap();
        if store.shared().is_some() {
            assert!(
                store.claim_pending_grants().await.unwrap().is_empty(),
                "{kind}: the process that stored them still holds the claim"
            );
            stores.cluster.connect().await.run("UPDATE adsidecar_waiting SET claimed_until = now()").await;
        }
        let left = store.claim_pending_grants().await.unwrap();
        let left: Vec<_> = left.iter().map(|waiting| (waiting.id.as_str(), waiting.user.as_str())).collect();
        assert_eq!(left, [("4", "bob")], "{kind}");
        store.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_starting_together_on_an_empty_database_all_start_with_the_same_key() {
    let stores = Stores::new();
    let keys = [Keyring::generate_key(), Keyring::generate_key()];
    for round in 0..5 {
        let (_, settings) = stores.empty().await.swap_remove(1);
        let begin = |key: &Secret| {
            let (settings, ring) = (settings.clone(), ring(&[key]));
            tokio::task::spawn_blocking(move || open(&settings, &ring).map(|(store, _)| store))
        };
        // One of the keys wins; all processes with it start, and the others get an error that names it.
        let begun: Vec<_> = (0..6).map(|at| begin(&keys[usize::from(at == 5 && round % 2 == 1)])).collect();
        let mut up = 0;
        for opened in begun {
            match opened.await.unwrap() {
                Ok(_) => up += 1,
                Err(StoreError::WrongKey { expected, .. }) => assert!(expected.is_some()),
                Err(error) => panic!("{error}"),
            }
        }
        assert!(if round % 2 == 0 { up == 6 } else { up == 5 || up == 1 }, "round {round}: {up} started");
    }
}
