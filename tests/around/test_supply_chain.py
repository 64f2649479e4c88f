"""What is linked in: the lock file holds nothing that the rules forbid, whatever tool is there to say so."""

import re
import tomllib


def versions(repository) -> dict[str, list[tuple[int, ...]]]:
    packages = tomllib.loads((repository / "Cargo.lock").read_text())["package"]
    found: dict[str, list[tuple[int, ...]]] = {}
    for package in packages:
        numbers = package["version"].partition("-")[0].partition("+")[0]
        found.setdefault(package["name"], []).append(tuple(int(number) for number in numbers.split(".")))
    return found


def test_threat_38_no_crate_below_the_version_that_mended_it_and_none_that_is_forbidden(repository):
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


def test_threat_38_every_crate_has_a_checksum_and_comes_from_the_registry(repository):
    packages = tomllib.loads((repository / "Cargo.lock").read_text())["package"]
    foreign = [package for package in packages if package["name"] != "adsidecar"]
    assert len(foreign) > 100
    for package in foreign:
        assert package["source"] == "registry+https://github.com/rust-lang/crates.io-index", package["name"]
        assert len(package["checksum"]) == 64, package["name"]


def test_threat_38_every_build_is_locked(repository):
    """Without --locked a build may take other versions than those that were looked at."""
    places = [repository / "Dockerfile", repository / "tests" / "run"]
    lines = [line for place in places for line in place.read_text().splitlines() if not line.lstrip().startswith("#")]
    builds = [line for line in lines if re.search(r"\bcargo (build|install|clippy|doc|test|nextest run)\b", line)]
    assert len(builds) >= 8
    for line in builds:
        # The step's own name comes before the command.
        assert "--locked" in line, line
