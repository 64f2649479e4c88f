use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::mpsc;

use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::*;
use crate::domain::grant::{Access, AccessToken, RefreshToken};
use crate::domain::secret::Secret;
use crate::store::stored_grant::StoredGrant;

/// A store in a temporary directory, with its keyring.
struct TestStore {
    dir: TempDir,
    keyring: Arc<Keyring>,
}

impl TestStore {
    fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), keyring: ring(&[&Keyring::generate_key()]) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("data/adsidecar.sled")
    }

    fn mirror(&self) -> PathBuf {
        self.dir.path().join("data/adsidecar.sled.copies")
    }

    fn mirror_file(&self, name: &str) -> PathBuf {
        self.mirror().join(format!("{:x}.json", Sha256::digest(name)))
    }

    fn try_open(&self) -> Result<(TokenStore, Opened), StoreError> {
        self.open_with(&self.keyring)
    }

    fn open_with(&self, keyring: &Arc<Keyring>) -> Result<(TokenStore, Opened), StoreError> {
        TokenStore::open(&Settings { path: self.path(), postgres: None }, Arc::clone(keyring))
    }

    fn open(&self) -> (TokenStore, Opened) {
        self.try_open().unwrap()
    }

    /// A closed store with one grant per name.
    async fn with_grants(names: &[&str]) -> Self {
        let test_store = Self::new();
        let (store, _) = test_store.open();
        for name in names {
            store.save(&user(name), &grant(name, 1), None).await.unwrap();
        }
        store.close().await.unwrap();
        test_store
    }

    /// The sled database, opened without our store.
    fn raw(&self) -> ::sled::Db {
        let config = ::sled::Config::new().path(self.path()).segment_size(512 << 10).flush_every_ms(None);
        config.open().unwrap()
    }

    /// A copy of the files, with the same keyring.
    fn duplicate(&self) -> Self {
        let duplicate = Self { dir: TempDir::new().unwrap(), keyring: Arc::clone(&self.keyring) };
        copy_dir(self.dir.path(), duplicate.dir.path());
        duplicate
    }

    /// The hash of each file's content.
    fn hashes(&self) -> BTreeMap<PathBuf, String> {
        let hash = |path: &PathBuf| format!("{:x}", Sha256::digest(fs::read(path).unwrap()));
        files_in(self.dir.path()).into_iter().map(|path| (path.clone(), hash(&path))).collect()
    }
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files_in(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn copy_dir(from: &Path, to: &Path) {
    for path in files_in(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(path, target).unwrap();
    }
}

fn ring(keys: &[&Secret]) -> Arc<Keyring> {
    let keys: Vec<_> = keys.iter().map(|key| (*key).clone()).collect();
    Arc::new(Keyring::new(&keys).unwrap())
}

fn user(name: &str) -> UserId {
    name.parse().unwrap()
}

fn grant(name: &str, generation: u64) -> Grant {
    let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    let updated_at = start + SignedDuration::from_secs(generation.try_into().unwrap());
    Grant {
        refresh_token: RefreshToken::new(format!("Atzr|{name}-{generation}")).unwrap(),
        previous: None,
        access: Some(Access {
            token: AccessToken::new(format!("Atza|{name}-{generation}")).unwrap(),
            expires_at: updated_at + SignedDuration::from_hours(1),
        }),
        updated_at,
        consented_at: None,
        used_at: None,
        scope: None,
        generation,
    }
}

fn refresh_token(grant: &Grant) -> &str {
    grant.refresh_token.secret().expose()
}

/// Each user's refresh token, or the error of the record.
fn summary(users: &[(UserId, Result<Grant, StoredGrantError>)]) -> BTreeMap<String, Result<String, StoredGrantError>> {
    let entry = |(user, grant): &(UserId, Result<Grant, StoredGrantError>)| {
        (user.to_string(), grant.as_ref().map(|grant| refresh_token(grant).to_owned()).map_err(|error| *error))
    };
    users.iter().map(entry).collect()
}

fn expected(names: &[&str], generation: u64) -> BTreeMap<String, Result<String, StoredGrantError>> {
    names.iter().map(|name| ((*name).to_owned(), Ok(format!("Atzr|{name}-{generation}")))).collect()
}

// What is refused: wrong keys.

#[tokio::test]
// Covers: failure 43.
async fn a_wrong_key_is_refused_with_both_fingerprints_and_no_file_changes() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    let before = test_store.hashes();
    let wrong = ring(&[&Keyring::generate_key(), &Keyring::generate_key()]);
    for _ in 0..3 {
        let error = test_store.open_with(&wrong).unwrap_err();
        let StoreError::WrongKey { expected, have } = &error else { panic!("{error}") };
        assert_eq!(*expected, Some(test_store.keyring.first()));
        assert_eq!(*have, wrong.fingerprints());
        let message = error.to_string();
        assert!(message.contains(&test_store.keyring.first().to_string()), "{message}");
        assert!(message.contains(&wrong.first().to_string()), "{message}");
        assert!(message.contains("add the key it was sealed with"), "{message}");
    }
    assert_eq!(test_store.hashes(), before);
    assert_eq!(summary(&test_store.open().1.users), expected(&["anna"], 1));
}

#[tokio::test]
async fn a_wrong_key_is_refused_even_if_the_key_file_is_lost() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let wrong = ring(&[&Keyring::generate_key()]);
    fs::remove_file(test_store.mirror().join("key")).unwrap();
    let before = test_store.hashes();
    let error = test_store.open_with(&wrong).unwrap_err();
    assert!(matches!(error, StoreError::WrongKey { expected: None, .. }), "{error}");
    assert_eq!(test_store.hashes(), before);

    fs::remove_dir_all(test_store.mirror()).unwrap();
    let error = test_store.open_with(&wrong).unwrap_err();
    assert!(matches!(error, StoreError::WrongKey { expected: None, .. }), "{error}");
    assert!(!test_store.mirror().join("key").exists());
    assert_eq!(summary(&test_store.open().1.users), expected(&["anna", "bob"], 1));
}

#[tokio::test]
async fn a_damaged_key_file_does_not_lock_out_the_right_key() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    let key = test_store.keyring.first().to_string();
    let flipped = if key.starts_with('a') { key.replacen('a', "c", 1) } else { format!("a{}", &key[1..]) };
    for garbage in ["", "zzzzzzzz", "\u{fffd}\u{fffd}", &format!("{flipped} {key}"), &format!("{key} {flipped}"), &key]
    {
        fs::write(test_store.mirror().join("key"), garbage).unwrap();
        let (store, opened) = test_store.open();
        assert_eq!(summary(&opened.users), expected(&["anna"], 1));
        store.close().await.unwrap();
        let rewritten = fs::read_to_string(test_store.mirror().join("key")).unwrap();
        assert_eq!(rewritten.trim_end(), format!("{0} {0}", test_store.keyring.first()));
    }
}

// What is refused: other processes, other directories.

#[tokio::test]
// Covers: failure 38.
async fn a_second_process_is_refused_and_does_not_disturb_the_first() {
    let test_store = TestStore::new();
    let (store, _) = test_store.open();
    store.save(&user("anna"), &grant("anna", 1), None).await.unwrap();
    let error = test_store.try_open().unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains("another adsidecar uses") && message.contains("adsidecar.sled"), "{message}");
    assert!(message.contains("store.path"), "{message}");
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    store.close().await.unwrap();
    assert_eq!(summary(&test_store.open().1.users), expected(&["anna"], 2));
}

#[tokio::test]
async fn a_database_locked_by_another_program_is_reported_as_locked() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    let holder = test_store.raw();
    assert!(matches!(test_store.try_open().unwrap_err(), StoreError::Locked { .. }));
    drop(holder);
    assert_eq!(summary(&test_store.open().1.users), expected(&["anna"], 1));
}

#[test]
fn a_database_not_created_by_adsidecar_is_refused_and_left_in_place() {
    let test_store = TestStore::new();
    drop(::sled::Config::new().path(test_store.path()).segment_size(64 << 10).open().unwrap());
    let error = test_store.try_open().unwrap_err();
    assert!(matches!(error, StoreError::UnusableDatabase { .. }), "{error}");
    assert!(error.to_string().contains("give store.path a directory of its own"));
    assert!(test_store.path().join("db").exists());
}

#[test]
// Covers: failure 53.
fn a_file_system_error_names_the_path_and_the_remedy() {
    let test_store = TestStore::new();
    fs::write(test_store.dir.path().join("data"), "a file where the directory should be").unwrap();
    let error = test_store.try_open().unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(error.to_string().contains(&*test_store.dir.path().to_string_lossy()), "{error}");

    let process = fs::metadata("/proc/self").map(|process| std::os::unix::fs::MetadataExt::uid(&process));
    let this_user = process.map_or_else(|_| "this user".to_owned(), |uid| format!("uid {uid}"));
    for (kind, remedy) in [
        (io::ErrorKind::PermissionDenied, format!("give {this_user} read and write access to it")),
        (io::ErrorKind::ReadOnlyFilesystem, format!("mount the volume writable for {this_user}")),
        (io::ErrorKind::StorageFull, "free space on its volume".into()),
    ] {
        let message = files::io_error(&test_store.path(), kind.into()).to_string();
        assert!(message.contains(&remedy) && message.contains("adsidecar.sled"), "{message}");
    }
}

// What is refused: single operations.

#[tokio::test]
async fn a_save_based_on_another_generation_is_a_conflict() {
    let test_store = TestStore::new();
    let (store, _) = test_store.open();
    let anna = user("anna");
    assert!(matches!(store.save(&anna, &grant("anna", 2), Some(1)).await, Err(StoreError::Conflict)));
    store.save(&anna, &grant("anna", 1), None).await.unwrap();
    store.save(&anna, &grant("anna", 2), Some(1)).await.unwrap();
    assert!(matches!(store.save(&anna, &grant("anna-late", 2), Some(1)).await, Err(StoreError::Conflict)));
    assert!(matches!(store.save(&anna, &grant("anna", 4), Some(3)).await, Err(StoreError::Conflict)));
    store.erase(&anna).await.unwrap();
    assert!(matches!(store.save(&anna, &grant("anna", 3), Some(2)).await, Err(StoreError::Conflict)));
    assert!(store.load(&anna).await.unwrap().is_none());
    assert!(store.health().up);
}

#[tokio::test]
async fn repeating_an_applied_save_is_no_conflict() {
    let test_store = TestStore::new();
    let (store, _) = test_store.open();
    let anna = user("anna");
    store.save(&anna, &grant("anna", 1), None).await.unwrap();
    for _ in 0..2 {
        store.save(&anna, &grant("anna", 2), Some(1)).await.unwrap();
    }
    assert_eq!(refresh_token(&store.load(&anna).await.unwrap().unwrap()), "Atzr|anna-2");
}

#[tokio::test]
// Covers: failure 48.
async fn records_swapped_between_users_are_refused_and_kept() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let raw = test_store.raw();
    let grants = raw.open_tree("grants").unwrap();
    let (annas, bobs) = (grants.get("anna").unwrap().unwrap(), grants.get("bob").unwrap().unwrap());
    grants.insert("anna", bobs).unwrap();
    grants.insert("bob", annas).unwrap();
    raw.flush().unwrap();
    let swapped: Vec<_> = grants.iter().map(Result::unwrap).collect();
    drop((grants, raw));

    let (store, opened) = test_store.open();
    let tampered = |name: &str| (name.to_owned(), Err(StoredGrantError::Tampered));
    assert_eq!(summary(&opened.users), [tampered("anna"), tampered("bob")].into());
    assert_eq!(summary(&store.scan().await.unwrap()), summary(&opened.users));
    let load = store.load(&user("anna")).await;
    assert!(matches!(load, Err(StoreError::Unreadable(StoredGrantError::Tampered))));
    assert_eq!(store.reseal().await.unwrap(), Reseal { resealed: 0, unreadable: 2 });
    store.close().await.unwrap();
    let kept: Vec<_> = test_store.raw().open_tree("grants").unwrap().iter().map(Result::unwrap).collect();
    assert_eq!(kept, swapped);
}

#[tokio::test]
// Covers: failure 48.
async fn an_older_record_restored_outside_adsidecar_is_not_used() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let old = test_store.raw().open_tree("grants").unwrap().get("anna").unwrap().unwrap();
    let (store, _) = test_store.open();
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    store.close().await.unwrap();
    let raw = test_store.raw();
    raw.open_tree("grants").unwrap().insert("anna", old).unwrap();
    raw.flush().unwrap();
    drop(raw);
    for restored in [1, 0] {
        let (store, opened) = test_store.open();
        assert_eq!(opened.restored, restored);
        let mut users = expected(&["bob"], 1);
        users.extend(expected(&["anna"], 2));
        assert_eq!(summary(&opened.users), users);
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn records_that_cannot_be_opened_are_reported_and_kept() {
    let test_store = TestStore::with_grants(&["anna", "bob", "carl"]).await;
    let other_ring = ring(&[&Keyring::generate_key()]);
    let foreign = StoredGrant::seal(&grant("bob", 9), &user("bob"), &other_ring).to_json();
    let raw = test_store.raw();
    let grants = raw.open_tree("grants").unwrap();
    grants.insert("bob", foreign.clone()).unwrap();
    grants.insert("carl", "no record").unwrap();
    raw.flush().unwrap();
    drop((grants, raw));

    for _ in 0..2 {
        let (store, opened) = test_store.open();
        let users = summary(&opened.users);
        assert_eq!(users["anna"], Ok("Atzr|anna-1".to_owned()));
        assert_eq!(users["bob"], Err(StoredGrantError::Undecryptable));
        assert!(matches!(users["carl"], Err(StoredGrantError::Malformed(_))));
        let dump = store.dump().await.unwrap();
        assert_eq!(dump[&user("bob")], serde_json::from_slice::<serde_json::Value>(&foreign).unwrap());
        assert_eq!(dump[&user("carl")], "no record");
        // Their earlier mirror files are kept too.
        assert!(test_store.mirror_file("bob").exists() && test_store.mirror_file("carl").exists());
        store.close().await.unwrap();
    }
}

#[tokio::test]
// Covers: failure 41.
async fn an_operation_past_its_deadline_times_out_and_is_still_applied() {
    let test_store = TestStore::new();
    let (store, _) = test_store.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let impatient = worker.with_deadline(std::time::Duration::from_millis(20));
    let (go, wait) = mpsc::channel::<()>();
    let anna = user("anna");
    let late = impatient.call({
        let anna = anna.clone();
        move |engine| {
            let _ = wait.recv();
            engine.save(&anna, &grant("anna", 1), None)
        }
    });
    assert!(matches!(late.await, Err(StoreError::Timeout)));
    assert!(!store.health().up);
    assert!(store.health().last_error.unwrap().contains("did not answer in time"));
    go.send(()).unwrap();
    store.save(&anna, &grant("anna", 1), Some(0)).await.expect("the late save was applied, and repeating it succeeds");
    assert!(store.health().up);
}

#[tokio::test]
async fn a_full_queue_is_reported_as_a_timeout() {
    let test_store = TestStore::new();
    let (store, _) = test_store.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let impatient = worker.with_deadline(std::time::Duration::ZERO);
    let (go, wait) = mpsc::channel::<()>();
    let blocked = impatient.call(move |_| {
        let _ = wait.recv();
        Ok(())
    });
    assert!(matches!(blocked.await, Err(StoreError::Timeout)));
    for _ in 0..2000 {
        assert!(matches!(impatient.call(|engine| engine.scan()).await, Err(StoreError::Timeout)));
    }
    drop(go);
    store
        .close()
        .await
        .or_else(|error| if matches!(error, StoreError::Timeout) { Ok(()) } else { Err(error) })
        .unwrap();
}

#[tokio::test]
async fn a_closed_store_rejects_operations_and_releases_its_directory() {
    let test_store = TestStore::new();
    let (store, _) = test_store.open();
    let other_handle = store.clone();
    store.close().await.unwrap();
    assert!(matches!(other_handle.scan().await, Err(StoreError::Closed)));
    other_handle.close().await.unwrap();
    test_store.open();
}

#[tokio::test]
async fn a_panic_is_an_error_of_that_operation_only() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    let (store, _) = test_store.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let result = worker.call::<()>(|_| panic!("as sled might")).await;
    assert!(matches!(result, Err(StoreError::UnusableDatabase { .. })));
    assert!(!store.health().up);
    assert_eq!(summary(&store.scan().await.unwrap()), expected(&["anna"], 1));
    assert!(store.health().up);
    assert_eq!(store.health().recoveries, 0);
}

#[tokio::test]
// Covers: failure 42.
async fn after_a_failed_write_the_store_reloads_what_is_on_disk() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    let (store, _) = test_store.open();
    // A directory at the mirror file's path makes the mirror's write fail after the database's.
    fs::remove_file(test_store.mirror_file("anna")).unwrap();
    fs::create_dir(test_store.mirror_file("anna")).unwrap();
    let error = store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(!store.health().up);
    assert!(matches!(store.load(&user("anna")).await, Err(StoreError::Io { .. })));
    fs::remove_dir(test_store.mirror_file("anna")).unwrap();
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    assert!(store.health().up);
    assert!(test_store.mirror_file("anna").is_file());
    store.close().await.unwrap();
    assert_eq!(summary(&test_store.open().1.users), expected(&["anna"], 2));
}

// What the store promises.

#[tokio::test]
async fn acknowledged_writes_survive_reopening() {
    let test_store = TestStore::new();
    let names = ["anna", "bob@example.org", "c|d:e+f-g"];
    for generation in 1..=5 {
        let (store, opened) = test_store.open();
        assert_eq!(opened.users.len(), if generation == 1 { 0 } else { names.len() });
        assert!(opened.recovered.is_none() && opened.restored == 0 && opened.degraded.is_none());
        for name in names {
            let before = (generation > 1).then(|| generation - 1);
            store.save(&user(name), &grant(name, generation), before).await.unwrap();
        }
        assert_eq!(summary(&store.scan().await.unwrap()), expected(&names, generation));
        store.close().await.unwrap();
    }
    assert_eq!(summary(&test_store.open().1.users), expected(&names, 5));
}

#[tokio::test]
async fn a_record_stored_as_a_blob_survives_reopening() {
    let test_store = TestStore::new();
    let (store, _) = test_store.open();
    let mut large = grant("anna", 1);
    large.scope = Some("s".repeat(300_000));
    store.save(&user("anna"), &large, None).await.unwrap();
    assert!(
        fs::read_dir(test_store.path().join("blobs")).unwrap().next().is_some(),
        "sled wrote it to a separate file"
    );
    large.generation = 2;
    store.save(&user("anna"), &large, Some(1)).await.unwrap();
    store.close().await.unwrap();
    let (store, opened) = test_store.open();
    assert!(opened.recovered.is_none());
    let again = store.load(&user("anna")).await.unwrap().unwrap();
    assert_eq!((again.generation, again.scope), (2, large.scope));
}

#[tokio::test]
async fn only_the_owner_can_read_the_files_and_no_token_is_in_plaintext() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&test_store.path()), 0o700);
    assert_eq!(mode(&test_store.mirror()), 0o700);
    for path in files_in(&test_store.mirror()) {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    for path in files_in(test_store.dir.path()) {
        let content = fs::read(&path).unwrap();
        assert!(!content.windows(5).any(|bytes| bytes == b"Atzr|" || bytes == b"Atza|"), "{}", path.display());
    }
}

#[tokio::test]
// Covers: failure 36.
async fn a_snapshot_left_by_a_kill_during_startup_does_not_prevent_opening() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    for content in [&b""[..], b"half a snapshot", &[0; 4096]] {
        fs::write(test_store.path().join("snap.FFFFFFFFFFFFFFFF.generating"), content).unwrap();
        let (store, opened) = test_store.open();
        assert!(opened.recovered.is_none());
        assert_eq!(summary(&opened.users), expected(&["anna"], 1));
        assert!(!test_store.path().join("snap.FFFFFFFFFFFFFFFF.generating").exists());
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_logout_deletes_the_record_and_its_mirror_file() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let (store, _) = test_store.open();
    assert!(test_store.mirror_file("anna").exists());
    fs::write(test_store.mirror_file("anna").with_extension("tmp"), "left by a crash").unwrap();
    assert!(store.erase(&user("anna")).await.unwrap());
    assert!(!test_store.mirror_file("anna").exists() && !test_store.mirror_file("anna").with_extension("tmp").exists());
    assert!(!store.erase(&user("anna")).await.unwrap());
    assert!(store.load(&user("anna")).await.unwrap().is_none());
    store.close().await.unwrap();
    assert_eq!(summary(&test_store.open().1.users), expected(&["bob"], 1));
}

#[tokio::test]
async fn an_acknowledged_logout_survives_damage_to_the_database() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let (store, _) = test_store.open();
    store.erase(&user("anna")).await.unwrap();
    store.close().await.unwrap();
    fs::write(test_store.path().join("db"), vec![0xAA; 4096]).unwrap();
    let (_, opened) = test_store.open();
    assert!(opened.recovered.is_some());
    assert_eq!(summary(&opened.users), expected(&["bob"], 1));
}

#[tokio::test]
async fn repeating_a_logout_that_failed_at_its_last_step_completes_it() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    let older = test_store.duplicate();
    let (store, _) = test_store.open();
    let number = test_store.mirror().join("sequence");
    fs::create_dir(&number).unwrap();
    assert!(matches!(store.erase(&user("anna")).await, Err(StoreError::Io { .. })));
    fs::remove_dir(&number).unwrap();
    assert!(!store.erase(&user("anna")).await.unwrap());
    store.close().await.unwrap();
    fs::remove_dir_all(test_store.path()).unwrap();
    copy_dir(&older.path(), &test_store.path());
    assert!(test_store.open().1.users.is_empty());
}

#[tokio::test]
async fn restoring_an_older_database_does_not_undo_a_logout() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let older = test_store.duplicate();
    let (store, _) = test_store.open();
    store.erase(&user("anna")).await.unwrap();
    store.close().await.unwrap();
    fs::remove_dir_all(test_store.path()).unwrap();
    copy_dir(&older.path(), &test_store.path());

    let (store, opened) = test_store.open();
    assert_eq!(summary(&opened.users), expected(&["bob"], 1));
    assert_eq!(opened.restored, 1);
    let kept = opened.recovered.expect("the older state is kept");
    store.close().await.unwrap();
    fs::rename(kept, older.path().with_extension("kept")).unwrap();
    assert_eq!(summary(&test_store.open().1.users), expected(&["bob"], 1));
}

#[tokio::test]
// Covers: failure 34.
async fn on_a_full_volume_the_mirror_provides_the_users_and_the_reason_is_reported() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let (store, _) = test_store.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let full = files::io_error(&test_store.path(), io::ErrorKind::StorageFull.into());
    assert!(files::is_full(&full));
    let opened = worker.call(move |engine| engine.read_mirror_only(&full)).await.unwrap();
    assert_eq!(summary(&opened.users), expected(&["anna", "bob"], 1));
    assert!(opened.degraded.unwrap().contains("free space on its volume"));
}

#[tokio::test]
async fn a_damaged_mirror_file_is_rewritten_from_an_intact_database() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    fs::write(test_store.mirror_file("anna"), "{").unwrap();
    let (store, opened) = test_store.open();
    assert!(opened.unreadable_mirror_files.is_empty());
    store.close().await.unwrap();
    fs::remove_dir_all(test_store.path()).unwrap();
    assert_eq!(summary(&test_store.open().1.users), expected(&["anna"], 1));
}

/// Simulates a crash between the steps of a save and of an erasure by restoring the earlier files.
#[tokio::test]
async fn a_crash_between_database_and_mirror_is_repaired_at_the_next_start() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let old_copy = fs::read(test_store.mirror_file("anna")).unwrap();
    let (store, _) = test_store.open();
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    store.close().await.unwrap();

    // The save crashed after sled's commit.
    fs::write(test_store.mirror_file("anna"), &old_copy).unwrap();
    // The erasure crashed after it had deleted the mirror file.
    fs::remove_file(test_store.mirror_file("bob")).unwrap();
    let (store, opened) = test_store.open();
    assert_eq!((opened.restored, opened.recovered), (0, None));
    let mut users = expected(&["bob"], 1);
    users.extend(expected(&["anna"], 2));
    assert_eq!(summary(&opened.users), users);
    store.close().await.unwrap();

    // The mirror was brought up to date: it alone yields the same users.
    fs::remove_dir_all(test_store.path()).unwrap();
    let (_, opened) = test_store.open();
    assert_eq!(opened.restored, 2);
    assert_eq!(summary(&opened.users), users);
}

#[tokio::test]
async fn a_new_login_that_restarts_generations_is_not_undone_by_the_mirror() {
    let test_store = TestStore::new();
    let (store, _) = test_store.open();
    store.save(&user("anna"), &grant("anna", 9), None).await.unwrap();
    let before = fs::read(test_store.mirror_file("anna")).unwrap();
    store.save(&user("anna"), &grant("anna-again", 1), None).await.unwrap();
    assert_ne!(fs::read(test_store.mirror_file("anna")).unwrap(), before);
    store.close().await.unwrap();
    let (_, opened) = test_store.open();
    assert_eq!(opened.restored, 0);
    assert_eq!(summary(&opened.users)["anna"], Ok("Atzr|anna-again-1".to_owned()));
}

#[tokio::test]
async fn mirror_files_with_a_wrong_seal_are_skipped_kept_and_reported() {
    let test_store = TestStore::with_grants(&["anna", "bob", "carl"]).await;
    let annas = fs::read_to_string(test_store.mirror_file("anna")).unwrap();
    let forged = annas.replace("\"anna\"", "\"bob\"");
    fs::write(test_store.mirror_file("bob"), &forged).unwrap();
    fs::write(test_store.mirror_file("carl"), "{").unwrap();
    fs::remove_dir_all(test_store.path()).unwrap();
    let (store, opened) = test_store.open();
    assert_eq!(summary(&opened.users), expected(&["anna"], 1));
    let mut unusable = opened.unreadable_mirror_files;
    unusable.sort();
    let mut both = vec![test_store.mirror_file("bob"), test_store.mirror_file("carl")];
    both.sort();
    assert_eq!(unusable, both);
    store.close().await.unwrap();
    assert_eq!(fs::read_to_string(test_store.mirror_file("bob")).unwrap(), forged);
    assert_eq!(fs::read_to_string(test_store.mirror_file("carl")).unwrap(), "{");
}

/// Ways to damage a file with this content; `None` deletes it.
fn damages(content: &[u8]) -> Vec<(String, Option<Vec<u8>>)> {
    let length = content.len();
    let mut damages = vec![("deleted".to_owned(), None), ("zeroed".to_owned(), Some(vec![0; length]))];
    for eighths in 0..8 {
        let at = length * eighths / 8;
        damages.push((format!("cut to {at}"), Some(content[..at].to_vec())));
        let mut zeroed = content.to_vec();
        zeroed[at..].iter_mut().take(512).for_each(|byte| *byte = 0);
        damages.push((format!("512 bytes zeroed at {at}"), Some(zeroed)));
        let mut flipped = content.to_vec();
        flipped[at] ^= 0x10;
        damages.push((format!("a bit flipped at {at}"), Some(flipped)));
    }
    damages
}

#[tokio::test]
// Covers: failure 39.
async fn after_any_damage_to_the_database_all_users_are_restored_and_nothing_is_deleted() {
    let names: Vec<_> = (0..20).map(|n| format!("user-{n}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let test_store = TestStore::with_grants(&names).await;
    for generation in 2..=4 {
        let (store, _) = test_store.open();
        store.erase(&user("erased")).await.unwrap();
        for name in &names {
            store.save(&user(name), &grant(name, generation), Some(generation - 1)).await.unwrap();
        }
        store.save(&user("erased"), &grant("erased", 1), None).await.unwrap();
        store.set_note("fact", generation.to_string()).await.unwrap();
        store.erase(&user("erased")).await.unwrap();
        store.close().await.unwrap();
    }

    let mut recoveries = 0;
    for file in files_in(&test_store.path()) {
        for (damage, content) in damages(&fs::read(&file).unwrap()) {
            let duplicate = test_store.duplicate();
            let file = duplicate.dir.path().join(file.strip_prefix(test_store.dir.path()).unwrap());
            match &content {
                Some(content) => fs::write(&file, content).unwrap(),
                None => fs::remove_file(&file).unwrap(),
            }
            let what = format!("{} {damage}", file.file_name().unwrap().display());
            let (store, opened) = duplicate.try_open().unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(summary(&opened.users), expected(&names, 4), "{what}");
            assert_eq!(store.note("fact").await.unwrap().as_deref(), Some("4"), "{what}");
            if let Some(moved_to) = &opened.recovered {
                recoveries += 1;
                assert_eq!(opened.restored, names.len(), "{what}");
                assert!(moved_to.join("conf").exists() && moved_to.join("blobs").exists(), "{what}: moved as a whole");
                assert_eq!(store.health().recoveries, 1);
            }
            store.save(&user(names[0]), &grant(names[0], 5), Some(4)).await.unwrap();
            store.close().await.unwrap();
            let (store, opened) = duplicate.try_open().unwrap_or_else(|error| panic!("{what}, again: {error}"));
            assert!(opened.recovered.is_none(), "{what}, again");
            let mut after = expected(&names, 4);
            after.extend(expected(&names[..1], 5));
            assert_eq!(summary(&opened.users), after, "{what}, again");
            store.close().await.unwrap();
        }
    }
    assert!(recoveries > 10, "sled should reject most of this damage: {recoveries}");
}

#[tokio::test]
// Covers: failure 40.
async fn damage_found_while_running_is_repaired_at_the_next_operation() {
    let test_store = TestStore::with_grants(&["anna"]).await;
    let (store, _) = test_store.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let path = test_store.path();
    let damaged = move |_: &mut super::sled::Engine| {
        fs::write(path.join("db"), vec![0xAA; 4096]).unwrap();
        Err::<(), _>(StoreError::Damaged { path, reason: "as sled says on a bad read".into() })
    };
    assert!(matches!(worker.call(damaged).await, Err(StoreError::Damaged { .. })));
    assert_eq!(summary(&store.scan().await.unwrap()), expected(&["anna"], 1));
    let health = store.health();
    assert!(health.up);
    assert_eq!(health.recoveries, 1);
    store.close().await.unwrap();
}

#[tokio::test]
// Covers: failure 45.
async fn after_a_rotation_the_new_key_alone_opens_records_and_mirror() {
    let (old, new) = (Keyring::generate_key(), Keyring::generate_key());
    let mut test_store = TestStore::new();
    test_store.keyring = ring(&[&old]);
    let names = ["anna", "bob", "carl"];
    let (store, _) = test_store.open();
    for name in names {
        store.save(&user(name), &grant(name, 3), None).await.unwrap();
    }
    store.close().await.unwrap();

    let both = ring(&[&new, &old]);
    let (store, opened) = test_store.open_with(&both).unwrap();
    assert_eq!(summary(&opened.users), expected(&names, 3));
    // As if a rotation had been interrupted after one user.
    store.save(&user("bob"), &grant("bob", 3), Some(3)).await.unwrap();
    assert_eq!(store.reseal().await.unwrap(), Reseal { resealed: 2, unreadable: 0 });
    assert_eq!(store.reseal().await.unwrap(), Reseal::default());
    let anna = store.load(&user("anna")).await.unwrap().unwrap();
    assert_eq!((anna.generation, anna.updated_at), (3, grant("anna", 3).updated_at));
    store.close().await.unwrap();

    assert!(matches!(test_store.try_open(), Err(StoreError::WrongKey { .. })));
    test_store.keyring = ring(&[&new]);
    let (store, opened) = test_store.open();
    assert_eq!(summary(&opened.users), expected(&names, 3));
    store.close().await.unwrap();
    fs::remove_dir_all(test_store.path()).unwrap();
    assert_eq!(summary(&test_store.open().1.users), expected(&names, 3));
}

#[tokio::test]
// Covers: failure 46.
async fn removing_an_old_key_too_early_loses_no_record() {
    let (old, new) = (Keyring::generate_key(), Keyring::generate_key());
    let mut test_store = TestStore::new();
    test_store.keyring = ring(&[&old]);
    let (store, _) = test_store.open();
    for name in ["anna", "bob"] {
        store.save(&user(name), &grant(name, 1), None).await.unwrap();
    }
    store.close().await.unwrap();
    let (store, _) = test_store.open_with(&ring(&[&new, &old])).unwrap();
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    store.close().await.unwrap();

    let (store, opened) = test_store.open_with(&ring(&[&new])).unwrap();
    let users = summary(&opened.users);
    assert_eq!(users["anna"], Ok("Atzr|anna-2".to_owned()));
    assert_eq!(users["bob"], Err(StoredGrantError::Undecryptable));
    assert_eq!(store.reseal().await.unwrap(), Reseal { resealed: 0, unreadable: 1 });
    store.close().await.unwrap();
    let (_, opened) = test_store.open_with(&ring(&[&new, &old])).unwrap();
    assert_eq!(summary(&opened.users)["bob"], Ok("Atzr|bob-1".to_owned()));
}

#[tokio::test]
async fn notes_survive_restarts_logouts_and_loss_of_the_database() {
    let test_store = TestStore::with_grants(&["default"]).await;
    let (store, _) = test_store.open();
    assert_eq!(store.note("adopted").await.unwrap(), None);
    store.set_note("adopted", "one").await.unwrap();
    store.set_note("adopted", "two").await.unwrap();
    store.erase(&user("default")).await.unwrap();
    store.close().await.unwrap();
    let (store, opened) = test_store.open();
    assert!(opened.users.is_empty());
    assert_eq!(store.note("adopted").await.unwrap().as_deref(), Some("two"));
    store.close().await.unwrap();
    fs::remove_dir_all(test_store.path()).unwrap();
    let (store, _) = test_store.open();
    assert_eq!(store.note("adopted").await.unwrap().as_deref(), Some("two"));
}

#[tokio::test]
async fn a_line_of_the_journal_that_was_cut_off_names_nobody() {
    for cut in ["8 ann", "8 anna", "- ann", "- anna", "8 ", "8", ""] {
        let test_store = TestStore::new();
        let (store, _) = test_store.open();
        let begun = [("anna", Some(3)), ("ann", Some(4))].map(|(name, generation)| (user(name), generation));
        store.append_journal(begun.to_vec()).await.unwrap();
        store.close().await.unwrap();
        let file = test_store.mirror().join("journal");
        let whole = fs::read_to_string(&file).unwrap();
        fs::write(&file, whole + cut).unwrap();
        let (store, _) = test_store.open();
        store.append_journal(vec![(user("bob"), Some(5))]).await.unwrap();
        let expected = BTreeMap::from([(user("anna"), 3), (user("ann"), 4), (user("bob"), 5)]);
        assert_eq!(store.journal().await.unwrap(), Some(expected), "{cut:?}");
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_dump_can_be_imported_into_another_store() {
    let test_store = TestStore::with_grants(&["anna", "bob"]).await;
    let (store, _) = test_store.open();
    let dump = store.dump().await.unwrap();
    let elsewhere = TestStore { dir: TempDir::new().unwrap(), keyring: Arc::clone(&test_store.keyring) };
    let (other, _) = elsewhere.open();
    for (user, record) in dump {
        let grant = StoredGrant::import(record, &user, &test_store.keyring).unwrap();
        other.save(&user, &grant, None).await.unwrap();
    }
    assert_eq!(summary(&other.scan().await.unwrap()), expected(&["anna", "bob"], 1));
}
