"""Dependencies: the lock file contains nothing that the rules forbid, checked without cargo-deny."""

import functools
import json
import re
import subprocess
import tomllib


def versions(repository) -> dict[str, list[tuple[int, ...]]]:
    packages = tomllib.loads((repository / "Cargo.lock").read_text())["package"]
    found: dict[str, list[tuple[int, ...]]] = {}
    for package in packages:
        numbers = package["version"].partition("-")[0].partition("+")[0]
        found.setdefault(package["name"], []).append(tuple(int(number) for number in numbers.split(".")))
    return found


# Covers: threat 38.
def test_no_crate_is_below_its_fixed_version_or_forbidden(repository):
    found = versions(repository)
    # The same floors as in .deny.toml, which cargo-deny reads; here without it.
    deny = tomllib.loads((repository / ".deny.toml").read_text())["bans"]["deny"]
    floors = {name: floor for name, _, floor in (entry["crate"].partition(":<") for entry in deny) if floor}
    forbidden = {entry["crate"] for entry in deny if ":<" not in entry["crate"]}
    assert {"openssl", "openssl-sys", "native-tls"} <= forbidden
    assert {"hyper", "h2", "rustls", "rustls-webpki", "tokio"} <= set(floors)
    for name, floor in floors.items():
        least = tuple(int(number) for number in floor.split("."))
        assert found[name], name
        assert all(version >= least for version in found[name]), f"{name} {found[name]} is below {floor}"
    assert not forbidden & set(found)


# Covers: threat 38.
def test_every_crate_has_a_checksum_and_comes_from_the_registry(repository):
    packages = tomllib.loads((repository / "Cargo.lock").read_text())["package"]
    ours = {"adsidecar", "adsidecar-sandbox"}
    foreign = [package for package in packages if package["name"] not in ours]
    assert len(foreign) > 100
    for package in foreign:
        assert package["source"] == "registry+https://github.com/rust-lang/crates.io-index", package["name"]
        assert len(package["checksum"]) == 64, package["name"]


# Covers: threat 38.
def test_every_build_is_locked(repository):
    """Without --locked a build may use other versions than those that were reviewed."""
    places = [repository / "Dockerfile", repository / "tests" / "run"]
    lines = [line for place in places for line in place.read_text().splitlines() if not line.lstrip().startswith("#")]
    builds = [line for line in lines if re.search(r"\bcargo (build|install|clippy|doc|test|nextest run)\b", line)]
    assert len(builds) >= 8
    for line in builds:
        # The step's own name comes before the command.
        assert "--locked" in line, line


def tree_of(repository, *arguments: str) -> set[tuple[str, str]]:
    """Name and version of each package in `cargo tree -p adsidecar -e normal`."""
    command = ["cargo", "tree", "--locked", "-p", "adsidecar", "-e", "normal", "--prefix", "none", *arguments]
    lines = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout.splitlines()
    return {(line.split()[0], line.split()[1].removeprefix("v")) for line in lines if line.strip()}


def test_the_product_has_no_code_of_the_sandbox_and_cannot_make_certificates(repository):
    names = {name for name, _ in tree_of(repository)}
    assert {"hyper", "rustls", "sled"} <= names, "the tree was not read"
    assert not {"rcgen", "adsidecar-sandbox", "proptest", "shuttle", "divan", "fail", "tempfile"} & names
    assert not (repository / "src" / "sandbox").exists()
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=repository, check=True, capture_output=True, text=True)
    for name in tracked.stdout.split():
        text = "" if name.endswith(("/tests.rs", ".profdata")) else (repository / name).read_text()
        assert "rcgen" not in text and "mod sandbox" not in text, name


def test_the_bill_of_materials_lists_what_ships_and_nothing_else(repository):
    command = [repository / "deploy" / "bill-of-materials"]
    bill = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    listed = {(component["name"], component["version"]) for component in bill["components"]}
    assert bill["metadata"]["component"]["name"] == "adsidecar"
    rustc = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout
    everything = tree_of(repository, "--target", re.search(r"^host: (.*)$", rustc, re.MULTILINE)[1])
    assert listed <= everything
    # Not listed is what runs only in the compiler: procedural macros, and the packages that only they use.
    macros = {name for name, version in everything if is_procedural_macro(repository, name, version)}
    left_out = {name for name, _ in everything - listed} - {"adsidecar"}
    assert left_out - macros <= MADE_INTO_MACROS, left_out - macros
    for component in bill["components"]:
        assert len(component["hashes"][0]["content"]) == 64, component["name"]
        assert component["licenses"][0]["expression"], component["name"]


# Libraries that only procedural macros use.
MADE_INTO_MACROS = {
    "heck", "proc-macro2", "proc-macro2-diagnostics", "quote", "syn", "synstructure", "unicode-ident", "version_check",
    "yansi",
}


def is_procedural_macro(repository, name: str, version: str) -> bool:
    return (name, version) in procedural_macros(repository)


@functools.cache
def procedural_macros(repository) -> set[tuple[str, str]]:
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    metadata = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout
    return {
        (package["name"], package["version"])
        for package in json.loads(metadata)["packages"]
        if any("proc-macro" in target["kind"] for target in package["targets"])
    }


def test_the_binary_under_test_has_no_fail_points(adsidecar):
    """As what ships: built without the features that the dev-dependencies switch on."""
    binary = adsidecar.read_bytes()
    assert b"the configuration was reloaded" in binary, "log lines can be found in the binary"
    assert b"fail points are compiled in" not in binary


def test_both_crates_can_be_published(repository, tmp_path):
    """Without a build: `cargo package` checks the metadata, and that each file that is needed is in the crate."""
    command = ["cargo", "package", "--workspace", "--allow-dirty", "--no-verify", "--offline", "--target-dir", tmp_path]
    packaged = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert packaged.returncode == 0, packaged.stderr
    assert "no description, license" not in packaged.stderr and "manifest has no" not in packaged.stderr, (
        packaged.stderr
    )
    crates = sorted(path.name for path in (tmp_path / "package").glob("*.crate"))
    assert [crate.rsplit("-", 1)[0] for crate in crates] == ["adsidecar", "adsidecar-sandbox"]
    listing = subprocess.run(
        ["tar", "--list", "--file", tmp_path / "package" / crates[0]], check=True, capture_output=True, text=True
    ).stdout
    for path in ["src/main.rs", "src/store/postgres/schema.sql", "README.md", "LICENSE", "Cargo.lock"]:
        assert f"/{path}\n" in listing, path
    assert "/tests/" not in listing
