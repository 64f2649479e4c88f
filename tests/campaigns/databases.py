"""A temporary PostgreSQL, and logins at processes that share it."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import world

LOGIN = "/api/auth/amazon/login?user_id="
NOBODY = 65534


class Database:
    """A temporary cluster, on loopback and without a password."""

    def __init__(self, directory: Path):
        self.programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self.directory, self.port = directory, world.free_port()
        self.user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        directory.mkdir(parents=True)
        if self.user:
            os.chown(directory, NOBODY, NOBODY)
        for parent in directory.parents:
            if parent.name.startswith("adsidecar-"):
                parent.chmod(0o755)
        self.run("initdb", "-D", str(directory / "data"), "-U", "postgres", "-A", "trust", "--no-sync")
        self.start()

    def run(self, program: str, *words: str) -> str:
        command = [str(self.programs / program), *words]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=self.directory, **self.user
        ).stdout

    def start(self) -> None:
        command = [str(self.programs / "postgres"), "-D", str(self.directory / "data"), "-p", str(self.port)]
        command += ["-k", str(self.directory), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (self.directory / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory, **self.user)
        world.until("the database", lambda: self.answers())

    def answers(self) -> bool:
        try:
            return self.sql("SELECT 1") == "1"
        except subprocess.CalledProcessError:
            return False

    def crash(self) -> None:
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    def sql(self, statement: str) -> str:
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"]
        return self.run("psql", *where, "-AtXqc", statement).strip()

    def cut(self) -> None:
        self.sql("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'adsidecar'")

    @property
    def url(self) -> str:
        return f"postgres://postgres@127.0.0.1:{self.port}/postgres"


class Bouncer:
    """A PgBouncer in transaction mode before a database."""

    def __init__(self, database: Database, connections: int = 20):
        self.directory, self.port = database.directory, world.free_port()
        config = self.directory / "pgbouncer.ini"
        config.write_text(
            f"[databases]\npostgres = host=127.0.0.1 port={database.port} user=postgres\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = transaction\ndefault_pool_size = {connections}\nmax_client_conn = 1000\n"
        )
        self.process = subprocess.Popen(["pgbouncer", "--quiet", str(config)], env={"PATH": "/usr/sbin:/usr/bin"},
                                        stderr=subprocess.DEVNULL, **database.user)
        world.until("PgBouncer", lambda: self.process.poll() is None and self.listens())

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        except OSError:
            return False

    @property
    def url(self) -> str:
        return f"postgres://postgres@127.0.0.1:{self.port}/postgres"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def log_in(sandbox, begins, ends, user: str, note_code=lambda code: None) -> bool:
    """A login that starts at one replica and completes at another. `note_code` hears of the code between the two."""
    try:
        begun = json.loads(begins.get(LOGIN + user)[2])
        asked = {name: values[0] for name, values in parse_qs(urlsplit(begun["auth_url"]).query).items()}
        wish = {name: asked[name] for name in ("redirect_uri", "scope", "client_id", "code_challenge")}
        code = sandbox.order("POST", "/consent", {"want": "code", **wish})["code"]
        note_code(code)
        return ends.get(f"/api/auth/amazon/callback?code={code}&state={begun['state']}")[0] == 200
    except (OSError, KeyError, ValueError, world.http.client.HTTPException):
        return False
