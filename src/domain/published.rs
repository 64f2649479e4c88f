//! The operations that Amazon has published, as test data.
//!
//! `tests/fixtures/amazon-operations.tsv` holds one row for each path and method of the OpenAPI documents that were
//! public in 2026-11: path, method, headers (`*` marks a required one), the headers that the operation's description
//! says authorize it, the document, and when it was read.

/// One operation of the fixture.
pub(super) struct Operation {
    /// The path, with placeholders such as `{campaignId}`.
    pub(super) path: &'static str,
    /// The method, in capitals.
    pub(super) method: &'static str,
    /// Each declared header in lower case, and whether it is required.
    pub(super) headers: Vec<(String, bool)>,
    /// The headers in lower case that the operation's description names as the ones that authorize it.
    pub(super) authorized_by: Vec<String>,
}

/// Parses every row of the fixture.
pub(super) fn operations() -> Vec<Operation> {
    include_str!("../../tests/fixtures/amazon-operations.tsv").lines().skip(1).map(operation).collect()
}

fn operation(line: &'static str) -> Operation {
    let columns: Vec<_> = line.split('\t').collect();
    let [path, method, headers, authorized_by, _document, _read] = columns[..] else {
        panic!("{line:?} does not have six columns")
    };
    let declared = |header: &str| (header.trim_end_matches('*').to_ascii_lowercase(), header.ends_with('*'));
    Operation {
        path,
        method,
        headers: headers.split_ascii_whitespace().map(declared).collect(),
        authorized_by: authorized_by.split_ascii_whitespace().map(str::to_ascii_lowercase).collect(),
    }
}
