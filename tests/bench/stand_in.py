"""A stand-in for Amazon that is fast enough to measure against: nginx with a throw-away certificate. Also nginx as a
peer, and adsidecar in front of the stand-in."""

import atexit
import json
import os
import re
import socket
import subprocess
from pathlib import Path

from load import binary, free_port, until  # noqa: F401

TOKEN = "Atza|IwEBI" + "A" * 340  # as long as a real one
CLIENT = "amzn1.application-oa2-client.bench"
PROFILES = json.dumps({"profiles": [{"profileId": 1234567890 + n, "countryCode": "US"} for n in range(20)]})
TICK = os.sysconf("SC_CLK_TCK")

NGINX = """
worker_processes 1; daemon off; pid {place}/{name}.pid; error_log {place}/{name}.err warn;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 100000000; keepalive_timeout 600s; client_max_body_size 64m;
  client_body_temp_path {place}/{name}-1; proxy_temp_path {place}/{name}-2; fastcgi_temp_path {place}/{name}-3;
  uwsgi_temp_path {place}/{name}-4; scgi_temp_path {place}/{name}-5; default_type application/json;
  {rest}
}}
"""
STAND_IN = """
  map "$http_authorization|$http_amazon_advertising_api_clientid|$http_amazon_advertising_api_scope" $whole {{
    "~^Bearer Atza\\|.+\\|amzn1\\..+\\|1$" 1; default 0;
  }}
  server {{
    listen 127.0.0.1:{amazon} ssl http2; ssl_certificate {place}/leaf.pem; ssl_certificate_key {place}/leaf.key;
    ssl_protocols TLSv1.2 TLSv1.3; root {place};
    location = /auth/o2/token {{
        return 200
            '{{"access_token":"{token}","refresh_token":"Atzr|x","token_type":"bearer","expires_in":3600}}';
    }}
    location = /sp/small {{ if ($whole = 0) {{ return 403; }} return 200 '{profiles}'; }}
    location = /sp/upload {{
      if ($whole = 0) {{ return 403; }}
      # Reads the whole body. A plain `return` does not, and nginx would treat the rest of many bodies as an HTTP/2
      # flood.
      client_body_buffer_size 1m; proxy_pass_request_body off; proxy_set_header Content-Length "";
      proxy_pass http://unix:{place}/took.sock;
    }}
    location = /direct {{ return 200 '{profiles}'; }}
    location / {{ if ($whole = 0) {{ return 403; }} try_files $uri =404; }}
  }}
  server {{ listen unix:{place}/took.sock; return 200 '{{}}'; }}
"""

ADSIDECAR = """
environment = "production"
[amazon]
client_id = "{client}"
client_secret = "bench"
refresh_token = "Atzr|x"
token_url = "https://localhost:{amazon}/auth/o2/token"
ca_file = "{place}/ca.pem"
[proxy]
listen = "127.0.0.1:{port}"
[admin]
listen = "127.0.0.1:{admin}"
[store]
path = "{place}/store-{port}"
fernet_keys = "cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4="
[upstream]
na = "https://localhost:{upstream}"
ca_file = "{place}/ca.pem"
http2 = "{http2}"
[[account]]
name = "default"
profile_id = "1"
"""


def certificate(place: Path) -> None:
    """A throw-away CA, and a leaf for localhost."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, cwd=place, stderr=subprocess.DEVNULL)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    (place / "names").write_text("subjectAltName=DNS:localhost\n")
    openssl("req", "-x509", *key, "-days", "2", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    openssl("req", *key, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=localhost")
    openssl("x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "names", "-out", "leaf.pem")


class Running:
    """A process on one core, and the port at which it listens."""

    def __init__(self, core: int, port: int, *command: str, log: Path):
        self.port, self.log = port, log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                ["taskset", "--cpu-list", str(core), *command], stdout=out, stderr=out, env={"PATH": os.environ["PATH"]}
            )
        atexit.register(self.process.terminate)
        until(f"{command[0]} at port {port}, see {log}", self.listens, 60)

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def family(self) -> list[int]:
        """The process and its children: nginx works in one."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def cpu_us(self) -> float:
        """The CPU time that it has used, user and system."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.family()]
        return sum(int(stat[11]) + int(stat[12]) for stat in fields) / TICK * 1e6

    def memory_mib(self) -> float:
        status = [Path(f"/proc/{pid}/status").read_text() for pid in self.family()]
        return sum(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in status) / 1024


def nginx(place: Path, name: str, core: int, port: int, rest: str, **values) -> Running:
    config = place / f"{name}.conf"
    rest = rest.format(place=place, port=port, token=TOKEN, client=CLIENT, profiles=PROFILES, **values)
    config.write_text(NGINX.format(place=place, name=name, rest=rest))
    return Running(core, port, "nginx", "-c", str(config), "-p", str(place), log=place / f"{name}.log")


def adsidecar(place: Path, core: int, amazon: int, upstream: int, http2: str, *before: str) -> Running:
    """adsidecar with a token of the stand-in at port `amazon`, calling port `upstream`; `before` begins its command."""
    port, admin = free_port(), free_port()
    config = place / f"adsidecar-{port}.toml"
    words = {"port": port, "admin": admin, "amazon": amazon, "upstream": upstream, "http2": http2}
    config.write_text(ADSIDECAR.format(place=place, client=CLIENT, **words))
    command = [*before, binary("adsidecar"), "--config", str(config)]
    return Running(core, port, *command, log=place / f"adsidecar-{port}.log")
