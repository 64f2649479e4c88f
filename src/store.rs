//! Grants on disk.

use std::path::PathBuf;

/// Where grants are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `store.path`: the directory of the sled database. Beside it lie `<path>.copies/`, the second copy per user.
    pub path: PathBuf,
}
