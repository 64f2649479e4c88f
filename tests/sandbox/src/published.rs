//! The operations that Amazon has published, and the headers that each requires.

use std::sync::LazyLock;

/// One operation of `tests/fixtures/amazon-operations.tsv`.
#[derive(Debug)]
pub(super) struct Operation {
    /// The method, in capitals.
    pub(super) method: &'static str,
    /// The segments of the path, with placeholders such as `{campaignId}`.
    pub(super) path: Vec<&'static str>,
    /// The required headers in lower case, without the client id.
    pub(super) required: Vec<String>,
}

static OPERATIONS: LazyLock<Vec<Operation>> =
    LazyLock::new(|| include_str!("../../fixtures/amazon-operations.tsv").lines().skip(1).filter_map(parse).collect());

/// Every published operation.
#[cfg(test)]
pub(super) fn operations() -> &'static [Operation] {
    &OPERATIONS
}

/// The published operation of a request whose path was split at its slashes. A word in a path is preferred to a
/// placeholder: `/users/list` is not `/users/{id}`.
pub(super) fn find(method: &str, path: &[&str]) -> Option<&'static Operation> {
    let placeholders =
        |operation: &&Operation| operation.path.iter().filter(|segment| segment.starts_with('{')).count();
    OPERATIONS
        .iter()
        .filter(|operation| operation.method == method && operation.has_path(path))
        .min_by_key(placeholders)
}

/// Whether Amazon has published an operation with this path.
pub(super) fn has_path(path: &[&str]) -> bool {
    OPERATIONS.iter().any(|operation| operation.has_path(path))
}

impl Operation {
    fn has_path(&self, path: &[&str]) -> bool {
        let fits = |(wanted, segment): (&&str, &&str)| wanted.starts_with('{') || wanted == segment;
        self.path.len() == path.len() && self.path.iter().zip(path).all(fits)
    }
}

fn parse(line: &'static str) -> Option<Operation> {
    let mut columns = line.split('\t');
    let (path, method, headers) = (columns.next()?, columns.next()?, columns.next()?);
    let required = headers.split_ascii_whitespace().filter_map(|header| header.strip_suffix('*'));
    Some(Operation {
        method,
        path: path.split('/').filter(|segment| !segment.is_empty()).collect(),
        required: required.map(str::to_ascii_lowercase).filter(|name| !name.ends_with("clientid")).collect(),
    })
}
