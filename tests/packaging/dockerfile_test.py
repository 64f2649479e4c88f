"""Holds the Dockerfile to what it promises, on a machine without a container engine.

The facts are read from the parsed file; the build stage's own commands are replayed in an empty directory that holds
only what the Dockerfile copies there, and the final stage's files are put into a directory and started in it.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BUILD_COMMAND = "cargo build --package adsidecar --profile dist --locked --bin adsidecar"

# What gcr.io/distroless/cc-debian12 contains: the packages libc6 and libgcc-s1. (It has libstdc++ too; we have no C++.)
FINAL_STAGE_LIBRARIES = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}

# The Debian release behind each spelling of it in an image's name.
DEBIAN_RELEASES = {"bookworm": 12, "debian12": 12, "trixie": 13, "debian13": 13}


@dataclass
class Stage:
    """One FROM and the instructions under it."""

    image: str
    name: str | None
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.steps if name == instruction]


def parse(text: str) -> list[Stage]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    logical = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(str.strip, logical.splitlines()):
        instruction, arguments = line.strip().split(maxsplit=1)
        if instruction == "FROM":
            image, _, name = re.fullmatch(r"(\S+)( AS (\S+))?", arguments).groups()
            stages.append(Stage(image, name))
        else:
            stages[-1].steps.append((instruction, arguments))
    return stages


def without_flags(arguments: str) -> str:
    return re.sub(r"^(--\S+\s+)+", "", arguments)


def copied_from_context(stage: Stage) -> list[tuple[list[str], str]]:
    copies = [without_flags(c).split() for c in stage.all("COPY") if "--from=" not in c]
    return [(words[:-1], words[-1]) for words in copies]


@pytest.fixture(scope="module")
def stages(repository: Path) -> list[Stage]:
    return parse((repository / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def manifest(repository: Path) -> dict:
    return tomllib.loads((repository / "Cargo.toml").read_text())


def test_the_image_does_not_run_as_root_nor_under_a_name(stages):
    assert stages[-1].all("USER") == ["65532:65532"], "runAsNonRoot needs a number to recognize a user other than root"


def test_no_image_floats_with_a_missing_or_latest_tag(stages):
    for stage in stages:
        tag = re.search(r":([^/:@]+)(@sha256:[0-9a-f]{64})?$", stage.image)
        assert tag and tag[1] != "latest", f"{stage.image} may change at any time: give it a tag"


def test_no_instruction_is_there_that_kubernetes_ignores_or_a_shell_would_need(stages):
    assert stages[-1].all("HEALTHCHECK") == []
    assert stages[-1].all("RUN") == [], "the final stage has no shell"
    assert stages[-1].all("ENTRYPOINT") == ['["/adsidecar"]'], "the exec form: PID 1 gets the signals"


def test_no_secret_or_local_state_reaches_the_build_context(repository):
    rules = [r for r in (repository / ".dockerignore").read_text().split("\n") if r and not r.startswith("#")]
    assert rules == ["*", "!Cargo.toml", "!Cargo.lock", "!src", "!tests/sandbox/Cargo.toml"]


def test_every_copied_file_exists_and_is_in_the_build_context(stages, repository):
    allowed = {r[1:] for r in (repository / ".dockerignore").read_text().split() if r.startswith("!")}
    sources = [source for stage in stages for group, _ in copied_from_context(stage) for source in group]
    assert sources, "nothing is copied from the context"
    for source in sources:
        assert (repository / source).exists(), f"COPY {source}: no such file"
        within = (source, *map(str, Path(source).parents))
        assert allowed.intersection(within), f"COPY {source}: .dockerignore hides it"


def test_the_final_stage_copies_only_what_the_build_stage_makes(stages):
    build, final = stages
    assert build.name == "build"
    copies = [(c, without_flags(c).split()) for c in final.all("COPY")]
    assert [words for _, words in copies] == [
        ["/build/target/dist/adsidecar", "/adsidecar"],
        ["/out/data", "/data"],
    ]
    assert all("--from=build" in c for c, _ in copies)
    assert "--chown=65532:65532" in copies[1][0], "the store's directory belongs to the user that writes it"
    assert build.all("WORKDIR") == ["/build"]
    assert "mkdir -p /out/data" in build.all("RUN")[-1]


def test_the_store_lands_in_the_volume(stages):
    # store.path is `data/adsidecar.sled`, relative: the working directory decides where that is.
    assert stages[-1].all("WORKDIR") == ["/"]
    assert stages[-1].all("VOLUME") == ['["/data"]']


def test_the_rest_of_the_image_is_as_documented(stages):
    assert stages[-1].all("EXPOSE") == ["8001 9464"]
    assert stages[-1].all("STOPSIGNAL") == ["SIGTERM"]
    assert "TARGETARCH" in stages[0].all("ARG")


def test_the_toolchain_is_the_one_that_cargo_toml_asks_for(stages, manifest):
    asked = manifest["package"]["rust-version"]
    assert re.match(rf"rust:{re.escape(asked)}(\.\d+)?-", stages[0].image), f"{stages[0].image} is not Rust {asked}"


def test_both_stages_are_of_one_debian_so_that_their_glibc_is_the_same(stages):
    releases = [n for stage in stages for word, n in DEBIAN_RELEASES.items() if word in stage.image]
    assert len(releases) == 2 and releases[0] == releases[1], [stage.image for stage in stages]


def test_the_dependencies_are_built_before_the_sources_come(stages, repository):
    order = [(name, without_flags(arguments)) for name, arguments in stages[0].steps if name in ("COPY", "RUN")]
    assert [name for name, _ in order] == ["COPY", "COPY", "COPY", "RUN", "COPY", "RUN"]
    assert order[0][1] == "Cargo.toml Cargo.lock ./", "another file here would bust the layer too often"
    assert order[1][1] == "tests/sandbox/Cargo.toml tests/sandbox/", "the workspace's other manifest"
    assert order[2][1] == "src/serving.profdata src/", "the profile by which the dependencies are compiled too"
    [flags] = stages[0].all("ENV")
    release = (repository / "deploy" / "release").read_text().replace("$root", "/build")
    for flag in re.findall(r"-C\S+", flags.strip('"')):
        assert flag.strip('"') in release, "the image and the release are compiled alike"
    assert "-Cprofile-use=/build/src/serving.profdata" in flags
    assert f"\n{BUILD_COMMAND}\n" in release, "with the features of the same crates"
    for _, run in order[3::2]:
        assert re.findall(r"cargo .*?(?= &&|$)", run) == [BUILD_COMMAND]


def test_the_build_stage_works_with_nothing_but_what_is_copied(stages, repository, target_directory, tmp_path):
    """Replays COPY and RUN in order, with `cargo check` in place of the dist build, which takes minutes.

    The copies keep their dates, as Docker's do, so this also shows that the second build does not take the empty
    program of the first for up to date.
    """
    work, out = tmp_path / "build", tmp_path / "out"
    work.mkdir()
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target_directory), "CARGO_TERM_COLOR": "never"}
    compiled = []
    for name, arguments in stages[0].steps:
        if name == "COPY":
            *sources, destination = without_flags(arguments).split()
            for source in sources:
                if (repository / source).is_dir():
                    shutil.copytree(repository / source, work / destination, dirs_exist_ok=True)
                else:
                    # As in Docker: a missing directory is created.
                    if destination.endswith("/"):
                        (work / destination).mkdir(parents=True, exist_ok=True)
                    shutil.copy2(repository / source, work / destination)
        elif name == "RUN":
            script = without_flags(arguments).replace(BUILD_COMMAND, BUILD_COMMAND.replace("build", "check -v"))
            script = script.replace(" --profile dist", "")
            script = script.replace("/out/", f"{out}/")
            run = subprocess.run(["sh", "-ec", script], cwd=work, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, f"RUN {script}\n{run.stderr}"
            compiled.append(set(re.findall(r"--crate-name adsidecar --edition=\S+ (src/\w+\.rs)", run.stderr)))
    both = {"src/lib.rs", "src/main.rs"}
    assert compiled == [both, both], "the second build must compile the real sources, not keep the empty program"
    assert (out / "data").is_dir()


def test_the_binary_needs_only_what_the_final_stage_has(adsidecar):
    listing = subprocess.run(["readelf", "--dynamic", adsidecar], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", listing))
    assert "libc.so.6" in needed, "not a glibc binary: distroless/cc would be the wrong base"
    assert needed <= FINAL_STAGE_LIBRARIES, f"the image lacks {needed - FINAL_STAGE_LIBRARIES}"


def test_every_library_of_the_binary_is_found_and_none_brings_another(adsidecar):
    listing = subprocess.run(["ldd", adsidecar], check=True, capture_output=True, text=True).stdout
    names = {Path(line.split()[0]).name for line in listing.splitlines() if line.strip()}
    assert "not found" not in listing
    assert names - {"linux-vdso.so.1"} <= FINAL_STAGE_LIBRARIES, listing


@pytest.fixture
def final_root(stages, adsidecar, tmp_path) -> Path:
    """The final stage's file system: the files of its COPY lines, and of the base only the libraries that the binary
    loads."""
    root, made = tmp_path / "root", {"/build/target/dist/adsidecar": adsidecar}
    root.mkdir()
    for arguments in stages[-1].all("COPY"):
        source, destination = without_flags(arguments).split()
        there = root / destination.lstrip("/")
        if source in made:
            shutil.copy2(made[source], there)
        else:
            there.mkdir()
        if owner := re.search(r"--chown=(\d+):(\d+)", arguments):
            os.chown(there, int(owner[1]), int(owner[2]))
    listing = subprocess.run(["ldd", adsidecar], check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listing):
        there = root / library.lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, there)
    # Only their owner can read pytest's directories, and the image's user is another.
    for directory in [root, *root.parents[: len(root.parents) - len(Path("/tmp").parents) - 1]]:
        if directory.stat().st_uid == os.getuid() and directory != Path("/tmp"):
            directory.chmod(0o755)
    return root


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root; CI runs tests/run as root")
def test_the_final_stage_starts_as_its_user_with_nothing_but_its_files(stages, final_root):
    """Without an engine, but with the same files, user, working directory and entry point."""
    user, [entry_point] = stages[-1].all("USER")[0], [json.loads(one) for one in stages[-1].all("ENTRYPOINT")]
    environment = {
        "AMAZON_CLIENT_ID": "amzn1.application-oa2-client.test",
        "AMAZON_CLIENT_SECRET": "a-secret",
        "FERNET_KEY": "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4=",
        "ADSIDECAR_PROXY__LISTEN": f"127.0.0.1:{free_port()}",
        "ADSIDECAR_ADMIN__LISTEN": f"127.0.0.1:{free_port()}",
    }

    def inside(*words: str) -> list[str]:
        return [
            shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin"),
            f"--userspec={user}",
            "--groups=",
            str(final_root),
            *entry_point,
            *words,
        ]

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(inside(*words), env=environment, capture_output=True, text=True, timeout=60)

    assert run("version").stdout.startswith("adsidecar ")
    assert run("check").returncode == 0
    assert run("health").returncode == 1, "adsidecar is not running yet"
    serving = subprocess.Popen(inside(), env=environment, stderr=subprocess.PIPE, text=True)
    try:
        waited = run("wait", "--timeout", "30s")
        assert waited.returncode == 0, waited.stderr
        assert run("health", "--ready").returncode == 0
        status = Path(f"/proc/{serving.pid}/status").read_text()
        assert re.search(r"^Uid:\s+65532\s", status, re.MULTILINE)
        [store] = (final_root / "data").glob("*.sled")
        assert store.stat().st_uid == 65532, "the store is in the volume"
    finally:
        serving.send_signal(signal.Signals[stages[-1].all("STOPSIGNAL")[0]])
        assert serving.wait(30) == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
