//! The catalogue of what can go wrong, and of who may attack: each row has a test that is named after it, or this fails.
//!
//! A row's test is a function whose name begins with `row_16_` or `threat_06_`, in Rust, or with `test_` before that in
//! Python.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::floors::rust_files;

const ROWS: &[(u32, &str)] = &[
    // The token endpoint.
    (1, "LWA refuses connections while the token lives"),
    (2, "LWA is down and the token is dead"),
    (3, "LWA accepts and never answers"),
    (4, "LWA answers 500, 502, 503"),
    (5, "LWA answers 429"),
    (6, "LWA answers 200 with what is no JSON"),
    (7, "LWA's answer is cut off"),
    (8, "the answer holds no refresh token"),
    (9, "the answer holds another refresh token"),
    (10, "expires_in is missing"),
    (11, "expires_in is negative or 0"),
    (12, "expires_in is huge, a fraction, a string"),
    (13, "token_type is missing, or no bearer"),
    (14, "the access token cannot be sent"),
    (15, "the answer is too large, too deep, has keys twice"),
    (16, "invalid_grant"),
    (17, "invalid_client"),
    (18, "unauthorized_client, invalid_scope"),
    (19, "LWA redirects"),
    (20, "LWA's certificate is bad"),
    (21, "LWA's name does not resolve"),
    (22, "a thousand callers at the instant of expiry"),
    (23, "the caller who began a refresh hangs up"),
    (24, "a crash between LWA's answer and the disk"),
    (25, "the disk does not take a renewed grant"),
    (26, "a refresh panics"),
    (27, "background and caller renew at once"),
    (28, "a thousand users at start"),
    // The clock.
    (29, "the wall clock jumps ahead"),
    (30, "the wall clock jumps back"),
    (31, "the wall clock says 1970"),
    (32, "the node was suspended"),
    (33, "the clocks of replicas differ"),
    // The store.
    (34, "the disk is full at start"),
    (35, "the disk fills later"),
    (36, "SIGKILL at any system call"),
    (37, "the power is cut"),
    (38, "a second process on the same store"),
    (39, "a damaged database"),
    (40, "a read fails after a good open"),
    (41, "the disk hangs"),
    (42, "fsync fails"),
    (43, "a wrong Fernet key"),
    (44, "a Fernet key that is none"),
    (45, "keys are rotated"),
    (46, "the old key is taken away too early"),
    (47, "replicas with different keys"),
    (48, "a record is swapped or rolled back"),
    (49, "PostgreSQL is down"),
    (50, "PostgreSQL fails over in the middle of a refresh"),
    (51, "no connection is free, transaction pooling"),
    (52, "the schema is of another version"),
    (53, "the volume is read-only, or somebody else's"),
    // Upstream and proxying.
    (54, "401 for a token that looks good"),
    (55, "403"),
    (56, "429"),
    (57, "no connection"),
    (58, "the server closes an idle connection as a call takes it"),
    (59, "a reset before any byte of an answer"),
    (60, "a reset in the middle of an answer"),
    (61, "Amazon does not answer in time"),
    (62, "an answer before the request has been read"),
    (63, "1xx"),
    (64, "hop-by-hop headers, cookies, a huge head in an answer"),
    (65, "a compressed answer"),
    (66, "an answer without a body that has one"),
    (67, "HTTP/2: GOAWAY, resets, floods"),
    (68, "the caller goes away in the middle of an upload"),
    (69, "the caller goes away while it waits"),
    (70, "a caller that does not read"),
    (71, "too large a head, too many headers, too long a target"),
    (72, "trailers"),
    (73, "Expect: 100-continue"),
    (74, "Upgrade, CONNECT, TRACE"),
    (75, "HTTP/1.0"),
    (76, "a hundred pipelined requests"),
    (77, "forms of the target"),
    (78, "framing that can be read in two ways"),
    (79, "Host missing, twice, or none"),
    (80, "Authorization twice, twins, listed in Connection"),
    (81, "dot segments and encoded slashes"),
    // OAuth.
    (82, "the callback says access_denied"),
    (83, "the callback lacks parameters, or has them twice"),
    (84, "a state that is old, unknown, used"),
    (85, "a callback twice"),
    (86, "two logins of one user at once"),
    (87, "a restart between login and callback"),
    (88, "the exchange fails"),
    (89, "a smaller scope than asked for"),
    (90, "another Amazon identity"),
    (91, "a frontend URL that leads elsewhere"),
    (92, "a flood of logins"),
    (93, "logout during a refresh"),
    (94, "logout, then login at once"),
    (95, "a call in flight at logout"),
    // The process.
    (96, "SIGTERM under load"),
    (97, "a second SIGTERM, or the deadline"),
    (98, "SIGKILL"),
    (99, "no descriptors are left"),
    (100, "ten thousand idle connections"),
    (101, "memory is short"),
    (102, "the CPU is short"),
    (103, "a panic"),
    (104, "a wrong configuration"),
    (105, "secret files change"),
    (106, "nobody reads the log"),
    (107, "a secret in a log, metric, error"),
    (108, "a core dump"),
    (109, "a storm of scrapes"),
    (110, "liveness that lies"),
];

const THREATS: u32 = 42;

#[test]
fn each_row_of_what_can_go_wrong_has_a_test_named_after_it() {
    let tested = numbers_of("row_");
    let missing: Vec<_> = ROWS.iter().filter(|(row, _)| !tested.contains(row)).collect();
    assert!(missing.is_empty(), "rows without a test: {missing:?}");
}

#[test]
fn each_threat_has_a_test_named_after_it() {
    let tested = numbers_of("threat_");
    let missing: Vec<_> = (1..=THREATS).filter(|threat| !tested.contains(threat)).collect();
    assert!(missing.is_empty(), "threats without a test: {missing:?}");
}

/// The numbers in the names of tests that begin with `prefix`.
fn numbers_of(prefix: &str) -> BTreeSet<u32> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = [root.join("src"), root.join("tests")].into_iter().flat_map(|directory| rust_files(&directory));
    let mut numbers = BTreeSet::new();
    for file in sources.chain(python_files(&root.join("tests"))) {
        for line in fs::read_to_string(&file).unwrap().lines() {
            let line = line.trim_start();
            let name =
                ["fn ", "async fn ", "def test_", "async def test_"].iter().find_map(|word| line.strip_prefix(word));
            let digits: Option<u32> = name.and_then(|name| name.strip_prefix(prefix)?.split('_').next()?.parse().ok());
            numbers.extend(digits);
        }
    }
    numbers
}

fn python_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let (directories, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let here = files.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "py"));
    here.chain(directories.iter().flat_map(|directory| python_files(directory))).collect()
}
