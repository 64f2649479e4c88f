"""Other HTTP servers behind TLS, for the campaigns that check how a server parses our requests.

Installs what is missing: nginx and HAProxy from Debian (as root), h11, aiohttp and waitress from PyPI into separate
environments. HAProxy terminates TLS for those that speak plain HTTP. Node and openssl must be installed.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import world

SERVERS = Path(__file__).parent / "servers"
PYPI = {"h11": "h11==0.16.0", "aiohttp": "aiohttp==3.14.5", "waitress": "waitress==3.0.2", "h11-old": "h11==0.14.0"}


def trust(sandbox: world.Sandbox, directory: Path) -> Path:
    """The roots for `upstream.ca_file`: the sandbox's and that of `certificate`."""
    path = directory / "trusted.pem"
    path.write_text(sandbox.ca_file.read_text() + (directory / "cert.pem").read_text())
    return path


def install() -> None:
    missing = [
        package for package, program in [("nginx-light", "nginx"), ("haproxy", "haproxy")] if not shutil.which(program)
    ]
    if missing:
        command = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing]
        subprocess.run(["apt-get", "update", "--quiet", "--quiet"], check=True)
        subprocess.run(command, check=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    for program in ("node", "openssl"):
        if not shutil.which(program):
            raise SystemExit(f"{program} is missing")


def python_with(kind: str) -> str:
    """A Python with the package of this kind."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", world.REPOSITORY / "target")).resolve()
    environment = target / "soak-venv" / kind
    python = environment / "bin" / "python"
    if not (environment / PYPI[kind]).exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PYPI[kind]], check=True)
        (environment / PYPI[kind]).touch()
    return str(python)


def certificate(directory: Path) -> Path:
    """A separate certificate for 127.0.0.1 and its key, in one file."""
    path = directory / "server.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-keyout",
            str(directory / "key.pem"),
            "-out",
            str(directory / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    path.write_text((directory / "cert.pem").read_text() + (directory / "key.pem").read_text())
    return path


class Simple:
    """A backend that this Python can run and that speaks TLS itself, for quick tests."""

    def __init__(self, kind: str, directory: Path):
        self.directory, self.port, self.log = directory, world.free_port(), directory / "requests.log"
        command = [sys.executable, SERVERS / "servers.py", kind, str(self.port), self.log, certificate(directory)]
        self.process = subprocess.Popen(command)
        world.until(kind, lambda: listens(self.port))

    def before(self, sandbox: world.Sandbox) -> dict[str, str]:
        """The configuration that makes a sidecar use this backend."""
        trusted = str(trust(sandbox, self.directory))
        return {"ADSIDECAR_UPSTREAM__NA": f"https://127.0.0.1:{self.port}", "ADSIDECAR_UPSTREAM__CA_FILE": trusted}

    def seen(self) -> list[dict]:
        return entries(self.log)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    except OSError:
        return False


class Backend:
    """One other HTTP server. `origin` is its TLS address for adsidecar."""

    KINDS = ("nginx", "haproxy", "node", "node-insecure", "h11", "aiohttp", "waitress")

    def __init__(self, kind: str, directory: Path, pem: Path, tls: bool = True):
        self.kind, self.directory = kind, directory
        directory.mkdir(parents=True, exist_ok=True)
        self.log, self.processes = directory / "requests.log", []
        self.log.touch()
        self.plain, self.port = world.free_port(), world.free_port()
        self.origin = f"https://127.0.0.1:{self.port}"
        started = {"nginx": self.nginx, "haproxy": self.nginx, "node": self.node, "node-insecure": self.node}
        started.get(kind, self.python)()
        if tls:
            self.haproxy(pem)
            world.until(f"{kind} behind TLS", lambda: listens(self.port))
        world.until(kind, lambda: listens(self.plain))

    def spawn(self, *command: str) -> None:
        with (self.directory / "output.log").open("a") as output:
            self.processes.append(subprocess.Popen(command, stdout=output, stderr=output, cwd=self.directory))

    def python(self) -> None:
        kind = self.kind.removesuffix("-old")
        python = python_with(self.kind) if self.kind in PYPI else sys.executable
        self.spawn(python, str(SERVERS / "servers.py"), kind, str(self.plain), str(self.log))

    def node(self) -> None:
        flags = ["--insecure-http-parser"] if self.kind == "node-insecure" else []
        self.spawn("node", *flags, str(SERVERS / "node.js"), str(self.plain), str(self.log))

    def nginx(self) -> None:
        configuration = self.directory / "nginx.conf"
        configuration.write_text(f"""
            daemon off; user root; pid {self.directory}/nginx.pid; error_log {self.directory}/error.log crit;
            worker_processes 1;
            events {{ worker_connections 4096; }}
            http {{
                log_format seen escape=json '{{"target":"$request_uri",'
                                            '"headers":[["x-request-id","$http_x_request_id"]],'
                                            '"length":0,"body":"","status":$status}}';
                access_log off;
                client_body_temp_path {self.directory}/body; proxy_temp_path {self.directory}/proxy;
                fastcgi_temp_path {self.directory}/fastcgi; uwsgi_temp_path {self.directory}/uwsgi;
                scgi_temp_path {self.directory}/scgi;
                keepalive_requests 1000000;
                # The outer server reads a whole request before it forwards it to the inner one, which logs it.
                server {{ listen 127.0.0.1:{self.plain} backlog=4096;
                          location / {{ proxy_pass http://unix:{self.directory}/inner; }} }}
                server {{ listen unix:{self.directory}/inner; access_log {self.log} seen;
                          location / {{ add_header X-Echo $request_uri always; return 200; }} }}
            }}""")
        self.spawn("nginx", "-p", str(self.directory), "-c", str(configuration))

    def haproxy(self, pem: Path) -> None:
        """Terminates TLS; the kind `haproxy` also parses HTTP, the others get the bytes unchanged."""
        mode = "http" if self.kind == "haproxy" else "tcp"
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(
            f"global\n  maxconn 8000\n  nbthread 1\ndefaults\n  mode {mode}\n  timeout connect 5s\n  timeout client "
            "90s\n"
            f"  timeout server 90s\nfrontend tls\n  bind 127.0.0.1:{self.port} ssl crt {pem} alpn http/1.1\n"
            f"  default_backend plain\nbackend plain\n  server one 127.0.0.1:{self.plain}\n"
        )
        self.spawn("haproxy", "-db", "-f", str(configuration))

    def seen(self) -> list[dict]:
        """The complete requests that it has parsed so far, in order."""
        return entries(self.log)

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(20)


def entries(log: Path) -> list[dict]:
    """The complete requests in a backend's log."""
    read = (json.loads(line) for line in log.read_text("latin-1").split("\n") if line)
    return [entry for entry in read if entry.get("status", 200) == 200]


def header(entry: dict, name: str) -> list[str]:
    """Every value that the backend has under a name; WSGI does not distinguish `_` and `-`."""

    def plain(spelled: str) -> str:
        return re.sub("^http-", "", spelled.lower().replace("_", "-"))

    return [value for spelled, value in entry["headers"] if plain(spelled) == name]
