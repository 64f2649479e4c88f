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

/// A store in a directory that vanishes with it.
struct Place {
    dir: TempDir,
    keyring: Arc<Keyring>,
}

impl Place {
    fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), keyring: ring(&[&Keyring::generate_key()]) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("data/adsidecar.sled")
    }

    fn copies(&self) -> PathBuf {
        self.dir.path().join("data/adsidecar.sled.copies")
    }

    fn copy_of(&self, name: &str) -> PathBuf {
        self.copies().join(format!("{:x}.json", Sha256::digest(name)))
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

    /// A store with one stored grant per name, closed again.
    async fn filled(names: &[&str]) -> Self {
        let place = Self::new();
        let (store, _) = place.open();
        for name in names {
            store.save(&user(name), &grant(name, 1), None).await.unwrap();
        }
        store.close().await.unwrap();
        place
    }

    /// The database as sled sees it, past our store.
    fn raw(&self) -> sled::Db {
        let config = sled::Config::new().path(self.path()).segment_size(512 << 10).flush_every_ms(None);
        config.open().unwrap()
    }

    /// Another place with the same files and the same keys.
    fn twin(&self) -> Self {
        let twin = Self { dir: TempDir::new().unwrap(), keyring: Arc::clone(&self.keyring) };
        copy_dir(self.dir.path(), twin.dir.path());
        twin
    }

    /// Every file with the hash of its content.
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

/// Each user with the refresh token, or with what is wrong.
fn told(users: &[(UserId, Result<Grant, StoredGrantError>)]) -> BTreeMap<String, Result<String, StoredGrantError>> {
    let tell = |(user, grant): &(UserId, Result<Grant, StoredGrantError>)| {
        (user.to_string(), grant.as_ref().map(|grant| refresh_token(grant).to_owned()).map_err(|error| *error))
    };
    users.iter().map(tell).collect()
}

fn expected(names: &[&str], generation: u64) -> BTreeMap<String, Result<String, StoredGrantError>> {
    names.iter().map(|name| ((*name).to_owned(), Ok(format!("Atzr|{name}-{generation}")))).collect()
}

// Refusals: the key.

#[tokio::test]
async fn a_wrong_key_is_refused_even_where_the_key_check_was_lost() {
    let place = Place::filled(&["anna", "bob"]).await;
    let wrong = ring(&[&Keyring::generate_key()]);
    fs::remove_file(place.copies().join("key")).unwrap();
    let before = place.hashes();
    let error = place.open_with(&wrong).unwrap_err();
    assert!(matches!(error, StoreError::WrongKey { expected: None, .. }), "{error}");
    assert_eq!(place.hashes(), before);

    fs::remove_dir_all(place.copies()).unwrap();
    let error = place.open_with(&wrong).unwrap_err();
    assert!(matches!(error, StoreError::WrongKey { expected: None, .. }), "{error}");
    assert!(!place.copies().join("key").exists());
    assert_eq!(told(&place.open().1.users), expected(&["anna", "bob"], 1));
}

#[tokio::test]
async fn a_key_check_that_holds_no_fingerprint_does_not_lock_the_right_key_out() {
    let place = Place::filled(&["anna"]).await;
    let key = place.keyring.first().to_string();
    let flipped = if key.starts_with('a') { key.replacen('a', "c", 1) } else { format!("a{}", &key[1..]) };
    for garbage in ["", "zzzzzzzz", "\u{fffd}\u{fffd}", &format!("{flipped} {key}"), &format!("{key} {flipped}"), &key]
    {
        fs::write(place.copies().join("key"), garbage).unwrap();
        let (store, opened) = place.open();
        assert_eq!(told(&opened.users), expected(&["anna"], 1));
        store.close().await.unwrap();
        let rewritten = fs::read_to_string(place.copies().join("key")).unwrap();
        assert_eq!(rewritten.trim_end(), format!("{0} {0}", place.keyring.first()));
    }
}

// Refusals: other processes, other directories.

#[tokio::test]
// Covers: failure 38.
async fn a_second_opening_is_told_who_holds_it_and_disturbs_nothing() {
    let place = Place::new();
    let (store, _) = place.open();
    store.save(&user("anna"), &grant("anna", 1), None).await.unwrap();
    let error = place.try_open().unwrap_err();
    assert!(matches!(error, StoreError::Held { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains("another adsidecar holds") && message.contains("adsidecar.sled"), "{message}");
    assert!(message.contains("store.path"), "{message}");
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    store.close().await.unwrap();
    assert_eq!(told(&place.open().1.users), expected(&["anna"], 2));
}

#[tokio::test]
async fn a_database_that_something_else_holds_is_told_as_held() {
    let place = Place::filled(&["anna"]).await;
    let holder = place.raw();
    assert!(matches!(place.try_open().unwrap_err(), StoreError::Held { .. }));
    drop(holder);
    assert_eq!(told(&place.open().1.users), expected(&["anna"], 1));
}

#[test]
fn a_database_of_other_make_is_refused_and_stays_where_it_is() {
    let place = Place::new();
    drop(sled::Config::new().path(place.path()).segment_size(64 << 10).open().unwrap());
    let error = place.try_open().unwrap_err();
    assert!(matches!(error, StoreError::Engine { .. }), "{error}");
    assert!(error.to_string().contains("give store.path a directory of its own"));
    assert!(place.path().join("db").exists());
}

#[test]
// Covers: failure 53.
fn trouble_with_the_file_system_names_the_path_and_the_cure() {
    let place = Place::new();
    fs::write(place.dir.path().join("data"), "a file where the directory should be").unwrap();
    let error = place.try_open().unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(error.to_string().contains(&*place.dir.path().to_string_lossy()), "{error}");

    let process = fs::metadata("/proc/self").map(|process| std::os::unix::fs::MetadataExt::uid(&process));
    let who = process.map_or_else(|_| "this user".to_owned(), |uid| format!("uid {uid}"));
    for (kind, cure) in [
        (io::ErrorKind::PermissionDenied, format!("let {who} read and write it")),
        (io::ErrorKind::ReadOnlyFilesystem, format!("mount the volume writable for {who}")),
        (io::ErrorKind::StorageFull, "free space on its volume".into()),
    ] {
        let message = files::io_error(&place.path(), kind.into()).to_string();
        assert!(message.contains(&cure) && message.contains("adsidecar.sled"), "{message}");
    }
}

// Refusals: single operations.

#[tokio::test]
async fn a_change_computed_for_another_generation_is_refused() {
    let place = Place::new();
    let (store, _) = place.open();
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
async fn repeating_a_save_that_was_done_is_no_conflict() {
    let place = Place::new();
    let (store, _) = place.open();
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
    let place = Place::filled(&["anna", "bob"]).await;
    let raw = place.raw();
    let grants = raw.open_tree("grants").unwrap();
    let (annas, bobs) = (grants.get("anna").unwrap().unwrap(), grants.get("bob").unwrap().unwrap());
    grants.insert("anna", bobs).unwrap();
    grants.insert("bob", annas).unwrap();
    raw.flush().unwrap();
    let swapped: Vec<_> = grants.iter().map(Result::unwrap).collect();
    drop((grants, raw));

    let (store, opened) = place.open();
    let tampered = |name: &str| (name.to_owned(), Err(StoredGrantError::Tampered));
    assert_eq!(told(&opened.users), [tampered("anna"), tampered("bob")].into());
    assert_eq!(told(&store.scan().await.unwrap()), told(&opened.users));
    let load = store.load(&user("anna")).await;
    assert!(matches!(load, Err(StoreError::Record(StoredGrantError::Tampered))));
    assert_eq!(store.reseal().await.unwrap(), Reseal { resealed: 0, unreadable: 2 });
    store.close().await.unwrap();
    let kept: Vec<_> = place.raw().open_tree("grants").unwrap().iter().map(Result::unwrap).collect();
    assert_eq!(kept, swapped);
}

#[tokio::test]
// Covers: failure 48.
async fn a_record_that_was_put_back_in_an_older_state_is_not_used() {
    let place = Place::filled(&["anna", "bob"]).await;
    let old = place.raw().open_tree("grants").unwrap().get("anna").unwrap().unwrap();
    let (store, _) = place.open();
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    store.close().await.unwrap();
    let raw = place.raw();
    raw.open_tree("grants").unwrap().insert("anna", old).unwrap();
    raw.flush().unwrap();
    drop(raw);
    for restored in [1, 0] {
        let (store, opened) = place.open();
        assert_eq!(opened.restored, restored);
        let mut users = expected(&["bob"], 1);
        users.extend(expected(&["anna"], 2));
        assert_eq!(told(&opened.users), users);
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn single_records_that_do_not_open_are_reported_and_kept() {
    let place = Place::filled(&["anna", "bob", "carl"]).await;
    let strange = ring(&[&Keyring::generate_key()]);
    let foreign = StoredGrant::seal(&grant("bob", 9), &user("bob"), &strange).to_json();
    let raw = place.raw();
    let grants = raw.open_tree("grants").unwrap();
    grants.insert("bob", foreign.clone()).unwrap();
    grants.insert("carl", "no record").unwrap();
    raw.flush().unwrap();
    drop((grants, raw));

    for _ in 0..2 {
        let (store, opened) = place.open();
        let users = told(&opened.users);
        assert_eq!(users["anna"], Ok("Atzr|anna-1".to_owned()));
        assert_eq!(users["bob"], Err(StoredGrantError::Undecryptable));
        assert!(matches!(users["carl"], Err(StoredGrantError::Malformed(_))));
        let dump = store.dump().await.unwrap();
        assert_eq!(dump[&user("bob")], serde_json::from_slice::<serde_json::Value>(&foreign).unwrap());
        assert_eq!(dump[&user("carl")], "no record");
        // The copies of before are still there too.
        assert!(place.copy_of("bob").exists() && place.copy_of("carl").exists());
        store.close().await.unwrap();
    }
}

#[tokio::test]
// Covers: failure 41.
async fn an_operation_past_its_deadline_is_told_so_and_finished_later() {
    let place = Place::new();
    let (store, _) = place.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let hasty = worker.with_deadline(std::time::Duration::from_millis(20));
    let (go, wait) = mpsc::channel::<()>();
    let anna = user("anna");
    let late = hasty.call({
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
    store.save(&anna, &grant("anna", 1), Some(0)).await.expect("it is stored by now, and repeating it is right");
    assert!(store.health().up);
}

#[tokio::test]
async fn a_full_queue_is_told_as_a_timeout() {
    let place = Place::new();
    let (store, _) = place.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let hasty = worker.with_deadline(std::time::Duration::ZERO);
    let (go, wait) = mpsc::channel::<()>();
    let blocked = hasty.call(move |_| {
        let _ = wait.recv();
        Ok(())
    });
    assert!(matches!(blocked.await, Err(StoreError::Timeout)));
    for _ in 0..2000 {
        assert!(matches!(hasty.call(|engine| engine.scan()).await, Err(StoreError::Timeout)));
    }
    drop(go);
    store
        .close()
        .await
        .or_else(|error| if matches!(error, StoreError::Timeout) { Ok(()) } else { Err(error) })
        .unwrap();
}

#[tokio::test]
async fn a_closed_store_says_so_and_gives_its_directory_free() {
    let place = Place::new();
    let (store, _) = place.open();
    let other_handle = store.clone();
    store.close().await.unwrap();
    assert!(matches!(other_handle.scan().await, Err(StoreError::Closed)));
    other_handle.close().await.unwrap();
    place.open();
}

#[tokio::test]
async fn a_panic_in_the_store_is_an_error_and_the_next_operation_works() {
    let place = Place::filled(&["anna"]).await;
    let (store, _) = place.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let result = worker.call::<()>(|_| panic!("as sled might")).await;
    assert!(matches!(result, Err(StoreError::Engine { .. })));
    assert!(!store.health().up);
    assert_eq!(told(&store.scan().await.unwrap()), expected(&["anna"], 1));
    assert!(store.health().up);
    assert_eq!(store.health().recoveries, 0);
}

#[tokio::test]
// Covers: failure 42.
async fn after_a_failed_write_the_store_begins_again_with_what_is_on_disk() {
    let place = Place::filled(&["anna"]).await;
    let (store, _) = place.open();
    // A directory in the place of the copy makes the second write fail after the first.
    fs::remove_file(place.copy_of("anna")).unwrap();
    fs::create_dir(place.copy_of("anna")).unwrap();
    let error = store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
    assert!(!store.health().up);
    assert!(matches!(store.load(&user("anna")).await, Err(StoreError::Io { .. })));
    fs::remove_dir(place.copy_of("anna")).unwrap();
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    assert!(store.health().up);
    assert!(place.copy_of("anna").is_file());
    store.close().await.unwrap();
    assert_eq!(told(&place.open().1.users), expected(&["anna"], 2));
}

// What is promised.

#[tokio::test]
async fn acknowledged_writes_survive_reopening() {
    let place = Place::new();
    let names = ["anna", "bob@example.org", "c|d:e+f-g"];
    for generation in 1..=5 {
        let (store, opened) = place.open();
        assert_eq!(opened.users.len(), if generation == 1 { 0 } else { names.len() });
        assert!(opened.recovered.is_none() && opened.restored == 0 && opened.degraded.is_none());
        for name in names {
            let before = (generation > 1).then(|| generation - 1);
            store.save(&user(name), &grant(name, generation), before).await.unwrap();
        }
        assert_eq!(told(&store.scan().await.unwrap()), expected(&names, generation));
        store.close().await.unwrap();
    }
    assert_eq!(told(&place.open().1.users), expected(&names, 5));
}

#[tokio::test]
async fn a_record_too_large_for_the_log_survives_too() {
    let place = Place::new();
    let (store, _) = place.open();
    let mut large = grant("anna", 1);
    large.scope = Some("s".repeat(300_000));
    store.save(&user("anna"), &large, None).await.unwrap();
    assert!(fs::read_dir(place.path().join("blobs")).unwrap().next().is_some(), "sled wrote a file of its own for it");
    large.generation = 2;
    store.save(&user("anna"), &large, Some(1)).await.unwrap();
    store.close().await.unwrap();
    let (store, opened) = place.open();
    assert!(opened.recovered.is_none());
    let again = store.load(&user("anna")).await.unwrap().unwrap();
    assert_eq!((again.generation, again.scope), (2, large.scope));
}

#[tokio::test]
async fn only_the_owner_can_read_it_and_no_token_lies_there_in_the_clear() {
    let place = Place::filled(&["anna"]).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&place.path()), 0o700);
    assert_eq!(mode(&place.copies()), 0o700);
    for path in files_in(&place.copies()) {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    for path in files_in(place.dir.path()) {
        let content = fs::read(&path).unwrap();
        assert!(!content.windows(5).any(|bytes| bytes == b"Atzr|" || bytes == b"Atza|"), "{}", path.display());
    }
}

#[tokio::test]
// Covers: failure 36.
async fn what_a_kill_during_start_leaves_behind_does_not_brick_it() {
    let place = Place::filled(&["anna"]).await;
    for content in [&b""[..], b"half a snapshot", &[0; 4096]] {
        fs::write(place.path().join("snap.FFFFFFFFFFFFFFFF.generating"), content).unwrap();
        let (store, opened) = place.open();
        assert!(opened.recovered.is_none());
        assert_eq!(told(&opened.users), expected(&["anna"], 1));
        assert!(!place.path().join("snap.FFFFFFFFFFFFFFFF.generating").exists());
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_logout_removes_record_and_copy() {
    let place = Place::filled(&["anna", "bob"]).await;
    let (store, _) = place.open();
    assert!(place.copy_of("anna").exists());
    fs::write(place.copy_of("anna").with_extension("tmp"), "left by a crash").unwrap();
    assert!(store.erase(&user("anna")).await.unwrap());
    assert!(!place.copy_of("anna").exists() && !place.copy_of("anna").with_extension("tmp").exists());
    assert!(!store.erase(&user("anna")).await.unwrap());
    assert!(store.load(&user("anna")).await.unwrap().is_none());
    store.close().await.unwrap();
    assert_eq!(told(&place.open().1.users), expected(&["bob"], 1));
}

#[tokio::test]
async fn an_acknowledged_logout_stays_one_when_the_database_breaks() {
    let place = Place::filled(&["anna", "bob"]).await;
    let (store, _) = place.open();
    store.erase(&user("anna")).await.unwrap();
    store.close().await.unwrap();
    fs::write(place.path().join("db"), vec![0xAA; 4096]).unwrap();
    let (_, opened) = place.open();
    assert!(opened.recovered.is_some());
    assert_eq!(told(&opened.users), expected(&["bob"], 1));
}

#[tokio::test]
async fn a_logout_that_failed_at_its_last_step_is_complete_when_it_is_repeated() {
    let place = Place::filled(&["anna"]).await;
    let older = place.twin();
    let (store, _) = place.open();
    let number = place.copies().join("sequence");
    fs::create_dir(&number).unwrap();
    assert!(matches!(store.erase(&user("anna")).await, Err(StoreError::Io { .. })));
    fs::remove_dir(&number).unwrap();
    assert!(!store.erase(&user("anna")).await.unwrap());
    store.close().await.unwrap();
    fs::remove_dir_all(place.path()).unwrap();
    copy_dir(&older.path(), &place.path());
    assert!(place.open().1.users.is_empty());
}

#[tokio::test]
async fn an_older_state_of_the_database_does_not_bring_a_logged_out_user_back() {
    let place = Place::filled(&["anna", "bob"]).await;
    let older = place.twin();
    let (store, _) = place.open();
    store.erase(&user("anna")).await.unwrap();
    store.close().await.unwrap();
    fs::remove_dir_all(place.path()).unwrap();
    copy_dir(&older.path(), &place.path());

    let (store, opened) = place.open();
    assert_eq!(told(&opened.users), expected(&["bob"], 1));
    assert_eq!(opened.restored, 1);
    let kept = opened.recovered.expect("the older state is kept");
    store.close().await.unwrap();
    fs::rename(kept, older.path().with_extension("kept")).unwrap();
    assert_eq!(told(&place.open().1.users), expected(&["bob"], 1));
}

#[tokio::test]
// Covers: failure 34.
async fn on_a_full_volume_the_copies_tell_the_users_and_why_nothing_more_is_possible() {
    let place = Place::filled(&["anna", "bob"]).await;
    let (store, _) = place.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let full = files::io_error(&place.path(), io::ErrorKind::StorageFull.into());
    assert!(files::is_full(&full));
    let opened = worker.call(move |engine| engine.copies_alone(&full)).await.unwrap();
    assert_eq!(told(&opened.users), expected(&["anna", "bob"], 1));
    assert!(opened.degraded.unwrap().contains("free space on its volume"));
}

#[tokio::test]
async fn a_damaged_copy_is_written_anew_where_the_database_is_well() {
    let place = Place::filled(&["anna"]).await;
    fs::write(place.copy_of("anna"), "{").unwrap();
    let (store, opened) = place.open();
    assert!(opened.unusable_copies.is_empty());
    store.close().await.unwrap();
    fs::remove_dir_all(place.path()).unwrap();
    assert_eq!(told(&place.open().1.users), expected(&["anna"], 1));
}

/// Dies at each point between the steps of a save and of an erasure, by putting back the files of before.
#[tokio::test]
async fn a_crash_between_database_and_copy_is_set_right_at_the_next_start() {
    let place = Place::filled(&["anna", "bob"]).await;
    let old_copy = fs::read(place.copy_of("anna")).unwrap();
    let (store, _) = place.open();
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    store.close().await.unwrap();

    // The save died after sled's commit.
    fs::write(place.copy_of("anna"), &old_copy).unwrap();
    // The erasure died after it had deleted the copy.
    fs::remove_file(place.copy_of("bob")).unwrap();
    let (store, opened) = place.open();
    assert_eq!((opened.restored, opened.recovered), (0, None));
    let mut users = expected(&["bob"], 1);
    users.extend(expected(&["anna"], 2));
    assert_eq!(told(&opened.users), users);
    store.close().await.unwrap();

    // The copies were brought up to date: they alone tell the same.
    fs::remove_dir_all(place.path()).unwrap();
    let (_, opened) = place.open();
    assert_eq!(opened.restored, 2);
    assert_eq!(told(&opened.users), users);
}

#[tokio::test]
async fn a_login_that_counts_generations_anew_is_not_undone_by_an_older_copy() {
    let place = Place::new();
    let (store, _) = place.open();
    store.save(&user("anna"), &grant("anna", 9), None).await.unwrap();
    let before = fs::read(place.copy_of("anna")).unwrap();
    store.save(&user("anna"), &grant("anna-again", 1), None).await.unwrap();
    assert_ne!(fs::read(place.copy_of("anna")).unwrap(), before);
    store.close().await.unwrap();
    let (_, opened) = place.open();
    assert_eq!(opened.restored, 0);
    assert_eq!(told(&opened.users)["anna"], Ok("Atzr|anna-again-1".to_owned()));
}

#[tokio::test]
async fn copies_whose_seal_does_not_fit_are_skipped_kept_and_reported() {
    let place = Place::filled(&["anna", "bob", "carl"]).await;
    let annas = fs::read_to_string(place.copy_of("anna")).unwrap();
    let forged = annas.replace("\"anna\"", "\"bob\"");
    fs::write(place.copy_of("bob"), &forged).unwrap();
    fs::write(place.copy_of("carl"), "{").unwrap();
    fs::remove_dir_all(place.path()).unwrap();
    let (store, opened) = place.open();
    assert_eq!(told(&opened.users), expected(&["anna"], 1));
    let mut unusable = opened.unusable_copies;
    unusable.sort();
    let mut both = vec![place.copy_of("bob"), place.copy_of("carl")];
    both.sort();
    assert_eq!(unusable, both);
    store.close().await.unwrap();
    assert_eq!(fs::read_to_string(place.copy_of("bob")).unwrap(), forged);
    assert_eq!(fs::read_to_string(place.copy_of("carl")).unwrap(), "{");
}

/// Ways to damage a file of `length` bytes; `None` where there is nothing left of it.
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
async fn whatever_is_damaged_all_users_come_back_and_nothing_is_deleted() {
    let names: Vec<_> = (0..20).map(|n| format!("user-{n}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let place = Place::filled(&names).await;
    for generation in 2..=4 {
        let (store, _) = place.open();
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
    for file in files_in(&place.path()) {
        for (damage, content) in damages(&fs::read(&file).unwrap()) {
            let twin = place.twin();
            let file = twin.dir.path().join(file.strip_prefix(place.dir.path()).unwrap());
            match &content {
                Some(content) => fs::write(&file, content).unwrap(),
                None => fs::remove_file(&file).unwrap(),
            }
            let what = format!("{} {damage}", file.file_name().unwrap().display());
            let (store, opened) = twin.try_open().unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(told(&opened.users), expected(&names, 4), "{what}");
            assert_eq!(store.note("fact").await.unwrap().as_deref(), Some("4"), "{what}");
            if let Some(place) = &opened.recovered {
                recoveries += 1;
                assert_eq!(opened.restored, names.len(), "{what}");
                assert!(place.join("conf").exists() && place.join("blobs").exists(), "{what}: moved as a whole");
                assert_eq!(store.health().recoveries, 1);
            }
            store.save(&user(names[0]), &grant(names[0], 5), Some(4)).await.unwrap();
            store.close().await.unwrap();
            let (store, opened) = twin.try_open().unwrap_or_else(|error| panic!("{what}, again: {error}"));
            assert!(opened.recovered.is_none(), "{what}, again");
            let mut after = expected(&names, 4);
            after.extend(expected(&names[..1], 5));
            assert_eq!(told(&opened.users), after, "{what}, again");
            store.close().await.unwrap();
        }
    }
    assert!(recoveries > 10, "most of this is damage that sled refuses: {recoveries}");
}

#[tokio::test]
// Covers: failure 40.
async fn damage_that_shows_while_running_is_repaired_at_the_next_operation() {
    let place = Place::filled(&["anna"]).await;
    let (store, _) = place.open();
    let TokenStore::Sled(worker) = &store else { panic!("it is sled") };
    let path = place.path();
    let damaged = move |_: &mut engine::Engine| {
        fs::write(path.join("db"), vec![0xAA; 4096]).unwrap();
        Err::<(), _>(StoreError::Damaged { path, reason: "as sled says on a bad read".into() })
    };
    assert!(matches!(worker.call(damaged).await, Err(StoreError::Damaged { .. })));
    assert_eq!(told(&store.scan().await.unwrap()), expected(&["anna"], 1));
    let health = store.health();
    assert!(health.up);
    assert_eq!(health.recoveries, 1);
    store.close().await.unwrap();
}

#[tokio::test]
// Covers: failure 45.
async fn rotating_the_key_reseals_records_and_copies_so_that_the_new_key_is_enough() {
    let (old, new) = (Keyring::generate_key(), Keyring::generate_key());
    let mut place = Place::new();
    place.keyring = ring(&[&old]);
    let names = ["anna", "bob", "carl"];
    let (store, _) = place.open();
    for name in names {
        store.save(&user(name), &grant(name, 3), None).await.unwrap();
    }
    store.close().await.unwrap();

    let both = ring(&[&new, &old]);
    let (store, opened) = place.open_with(&both).unwrap();
    assert_eq!(told(&opened.users), expected(&names, 3));
    // As if a rotation had been interrupted after one user.
    store.save(&user("bob"), &grant("bob", 3), Some(3)).await.unwrap();
    assert_eq!(store.reseal().await.unwrap(), Reseal { resealed: 2, unreadable: 0 });
    assert_eq!(store.reseal().await.unwrap(), Reseal::default());
    let anna = store.load(&user("anna")).await.unwrap().unwrap();
    assert_eq!((anna.generation, anna.updated_at), (3, grant("anna", 3).updated_at));
    store.close().await.unwrap();

    assert!(matches!(place.try_open(), Err(StoreError::WrongKey { .. })));
    place.keyring = ring(&[&new]);
    let (store, opened) = place.open();
    assert_eq!(told(&opened.users), expected(&names, 3));
    store.close().await.unwrap();
    fs::remove_dir_all(place.path()).unwrap();
    assert_eq!(told(&place.open().1.users), expected(&names, 3));
}

#[tokio::test]
// Covers: failure 46.
async fn an_old_key_removed_too_early_costs_no_record() {
    let (old, new) = (Keyring::generate_key(), Keyring::generate_key());
    let mut place = Place::new();
    place.keyring = ring(&[&old]);
    let (store, _) = place.open();
    for name in ["anna", "bob"] {
        store.save(&user(name), &grant(name, 1), None).await.unwrap();
    }
    store.close().await.unwrap();
    let (store, _) = place.open_with(&ring(&[&new, &old])).unwrap();
    store.save(&user("anna"), &grant("anna", 2), Some(1)).await.unwrap();
    store.close().await.unwrap();

    let (store, opened) = place.open_with(&ring(&[&new])).unwrap();
    let users = told(&opened.users);
    assert_eq!(users["anna"], Ok("Atzr|anna-2".to_owned()));
    assert_eq!(users["bob"], Err(StoredGrantError::Undecryptable));
    assert_eq!(store.reseal().await.unwrap(), Reseal { resealed: 0, unreadable: 1 });
    store.close().await.unwrap();
    let (_, opened) = place.open_with(&ring(&[&new, &old])).unwrap();
    assert_eq!(told(&opened.users)["bob"], Ok("Atzr|bob-1".to_owned()));
}

#[tokio::test]
async fn notes_survive_restarts_logouts_and_the_loss_of_the_database() {
    let place = Place::filled(&["default"]).await;
    let (store, _) = place.open();
    assert_eq!(store.note("adopted").await.unwrap(), None);
    store.set_note("adopted", "one").await.unwrap();
    store.set_note("adopted", "two").await.unwrap();
    store.erase(&user("default")).await.unwrap();
    store.close().await.unwrap();
    let (store, opened) = place.open();
    assert!(opened.users.is_empty());
    assert_eq!(store.note("adopted").await.unwrap().as_deref(), Some("two"));
    store.close().await.unwrap();
    fs::remove_dir_all(place.path()).unwrap();
    let (store, _) = place.open();
    assert_eq!(store.note("adopted").await.unwrap().as_deref(), Some("two"));
}

#[tokio::test]
async fn a_dump_can_be_imported_elsewhere() {
    let place = Place::filled(&["anna", "bob"]).await;
    let (store, _) = place.open();
    let dump = store.dump().await.unwrap();
    let elsewhere = Place { dir: TempDir::new().unwrap(), keyring: Arc::clone(&place.keyring) };
    let (other, _) = elsewhere.open();
    for (user, record) in dump {
        let grant = StoredGrant::import(record, &user, &place.keyring).unwrap();
        other.save(&user, &grant, None).await.unwrap();
    }
    assert_eq!(told(&other.scan().await.unwrap()), expected(&["anna", "bob"], 1));
}
