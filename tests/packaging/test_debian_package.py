"""The Debian package: what is in it, and that it installs, serves and goes again in a root of its own.

The root is an overlay over this machine's, in a mount namespace of its own, so that `dpkg -i` runs as on a fresh
machine and leaves nothing behind.
"""

import json
import os
import re
import shutil
import subprocess
import textwrap
import urllib.request
from pathlib import Path

import pytest

# Of systemd-analyze security, from 0 (safe) to 10; what the unit has now, rounded up.
MOST_EXPOSED = 1.5


def build(repository: Path, adsidecar: Path, out: Path) -> None:
    # A debug build takes a minute to compress, and nobody downloads it.
    environment = {**os.environ, "DPKG_DEB_COMPRESSOR_TYPE": "none"}
    command = [repository / "deploy/debian/build", adsidecar, out]
    built = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def package(repository, adsidecar, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("package")
    build(repository, adsidecar, out)
    (built,) = out.glob("*.deb")
    return built


def test_the_same_binary_gives_the_same_bytes(repository, adsidecar, package, tmp_path):
    build(repository, adsidecar, tmp_path)
    assert (tmp_path / package.name).read_bytes() == package.read_bytes()


def test_the_package_holds_the_service_the_man_pages_and_the_completions(package):
    listing = subprocess.run(["dpkg-deb", "--contents", package], check=True, capture_output=True, text=True).stdout
    for path in [
        "/usr/bin/adsidecar",
        "/usr/lib/systemd/system/adsidecar.service",
        "/usr/lib/systemd/system/adsidecar.socket",
        "/etc/adsidecar/adsidecar.toml",
        "/usr/share/man/man1/adsidecar.1.gz",
        "/usr/share/man/man1/adsidecar-users-list.1.gz",
        "/usr/share/bash-completion/completions/adsidecar",
        "/usr/share/zsh/vendor-completions/_adsidecar",
        "/usr/share/fish/vendor_completions.d/adsidecar.fish",
        "/usr/share/doc/adsidecar/copyright",
    ]:
        assert re.search(rf"^-\S+ root/root .* \.{re.escape(path)}$", listing, re.MULTILINE), path
    fields = subprocess.run(["dpkg-deb", "--field", package], check=True, capture_output=True, text=True).stdout
    assert "Package: adsidecar" in fields and "Depends: libc6" in fields


def test_the_unit_is_valid_and_hardened(repository, tmp_path):
    # The program is looked up where the package puts it, which this machine does not have.
    text = (repository / "deploy/debian/adsidecar.service").read_text()
    unit = tmp_path / "adsidecar.service"
    unit.write_text(
        text.replace("/usr/bin/adsidecar serve", "/bin/true serve").replace("man:adsidecar(1)", "man:true(1)")
    )
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    own = [line for line in verified.stderr.splitlines() if "adsidecar.service" in line]
    assert verified.returncode == 0 and not own, verified.stderr
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", unit], capture_output=True, text=True
    )
    score = float(re.search(r"exposure level for adsidecar\.service: ([\d.]+)", judged.stdout).group(1))
    assert score <= MOST_EXPOSED, judged.stdout


def in_a_root_of_its_own(directory: Path, inputs: Path, script: str) -> subprocess.CompletedProcess:
    """Runs a script in an overlay of this machine's root, with the files of `inputs` in /tmp."""
    (inputs / "script").write_text(textwrap.dedent(script))
    enter = f"""
        set -e
        mount -t tmpfs tmpfs {directory}
        cd {directory}
        mkdir upper work root
        mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
        mount --rbind /dev root/dev
        mount -t proc proc root/proc
        cp {inputs}/* root/tmp/
        exec chroot root /bin/bash -e /tmp/script
    """
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    command = [*as_root, "unshare", "--mount", "--pid", "--fork", "bash", "-c", enter]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_installs_serves_a_user_of_the_sandbox_and_goes_without_a_trace_but_its_data(
    package, sandbox_of_its_own, tmp_path
):
    sandbox = sandbox_of_its_own
    wanted = urllib.request.Request(
        f"{sandbox.control}/consent", data=json.dumps({"want": "grant"}).encode(), method="POST"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(wanted, timeout=30) as answer:
        refresh_token = json.load(answer)["refresh_token"]
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    shutil.copy(package, inputs / "adsidecar.deb")
    shutil.copy(sandbox.ca_file, inputs / "ca.pem")
    # The sandbox's configuration, without what the service sets itself.
    text = Path(sandbox.config).read_text().replace(sandbox.ca_file, "/etc/adsidecar/ca.pem")
    kept = [line for line in text.splitlines() if not re.match(r"\s*(client_secret|fernet_keys|path|listen)\s*=", line)]
    (inputs / "adsidecar.toml").write_text("\n".join(kept) + "\n")
    secret = re.search(r'client_secret\s*=\s*"([^"]+)"', text).group(1)
    (tmp_path / "mounts").mkdir()
    ran = in_a_root_of_its_own(
        tmp_path / "mounts",
        inputs,
        f"""
        cd /
        # This machine's index of manual pages is large, and building it anew is not what is tested.
        rm -f /var/lib/man-db/auto-update
        dpkg -i /tmp/adsidecar.deb
        adsidecar version
        zcat /usr/share/man/man1/adsidecar.1.gz | grep -q 'Amazon Ads'
        bash -c 'source /usr/share/bash-completion/completions/adsidecar; complete -p adsidecar'

        # What the unit does, by hand: systemd does not run in here.
        cp /tmp/ca.pem /tmp/adsidecar.toml /etc/adsidecar/
        mkdir -p /run/credentials /var/lib/adsidecar
        printf %s '{secret}' > /run/credentials/client-secret
        adsidecar key new > /run/credentials/fernet-key
        printf %s '{refresh_token}' > /run/credentials/refresh-token
        unit=/usr/lib/systemd/system/adsidecar.service
        sed -n 's/^Environment=//p' $unit | sed 's,%d,/run/credentials,; s,%S,/var/lib,' > /tmp/environment
        start=$(sed -n 's/^ExecStart=//p' $unit)
        service="env -i PATH=/usr/bin:/bin $(cat /tmp/environment | tr '\\n' ' ')
            ADSIDECAR_PROXY__LISTEN=unix:/run/ads.sock ADSIDECAR_ADMIN__LISTEN=unix:/run/admin.sock
            ADSIDECAR_AMAZON__REFRESH_TOKEN_FILE=/run/credentials/refresh-token"
        $service $start 2> /tmp/log &
        for attempt in $(seq 100); do
            curl --silent --fail --unix-socket /run/admin.sock http://localhost/readyz && break
            sleep 0.1
        done
        curl --silent --show-error --fail --unix-socket /run/ads.sock http://localhost/v2/profiles \\
            || (cat /tmp/log; exit 1)

        echo
        # A person logs in, with a browser elsewhere, and pastes the URL at which it ended.
        mkfifo /tmp/keyboard
        $service adsidecar login --config /etc/adsidecar/adsidecar.toml --user anna < /tmp/keyboard > /tmp/login 2>&1 &
        exec 9> /tmp/keyboard
        for attempt in $(seq 100); do
            grep -q 'waiting for the consent' /tmp/login && break
            sleep 0.1
        done
        url=$(grep -o 'http[^ ]*/ap/oa?[^ ]*' /tmp/login) || (cat /tmp/login; exit 1)
        curl --silent --output /dev/null --write-out '%{{redirect_url}}\\n' "$url&decision=allow" >&9
        wait %2 || (cat /tmp/login; exit 1)
        exec 9>&-
        grep '^anna is logged in$' /tmp/login
        # What it says last is a command that works.
        bash -c "$(sed -n 's/^try it: //p' /tmp/login) --silent --show-error --fail" | grep -q profileId
        kill %1
        wait %1

        dpkg --remove adsidecar
        test ! -e /usr/bin/adsidecar
        test -e /etc/adsidecar/adsidecar.toml
        dpkg --purge adsidecar
        rm -f /etc/adsidecar/ca.pem
        ! dpkg --listfiles adsidecar 2> /dev/null
        find /usr /etc -name '*adsidecar*' | grep -v /etc/adsidecar$ && exit 1
        test -d /var/lib/adsidecar/adsidecar.sled
        echo gone
        """,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\nanna is logged in\n" in ran.stdout, ran.stdout
    assert f'"profileId":{sandbox.profile_id}' in ran.stdout.replace(" ", ""), ran.stdout
    assert ran.stdout.rstrip().endswith("gone"), ran.stdout
