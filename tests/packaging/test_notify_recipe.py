"""The e-mail relay deploy/notify-mail, from `adsidecar notify test` to a mail server."""

import os
import socket
import subprocess
import sys
import threading
import time

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DEADLINE = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def mail_server(port: int, mails: list[str]) -> None:
    """Takes one mail after the other (RFC 5321), for as long as the test runs."""
    server = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rwb") as stream:

                def say(line: str) -> None:
                    stream.write(line.encode() + b"\r\n")
                    stream.flush()

                say("220 test")
                for line in stream:
                    command = line.split()[0].upper()
                    if command == b"DATA":
                        say("354 go on")
                        mail = b""
                        while not mail.endswith(b"\r\n.\r\n"):
                            mail += stream.readline()
                        mails.append(mail.decode())
                        say("250 taken")
                    elif command == b"QUIT":
                        say("221 bye")
                        break
                    else:
                        say("250 ok")

    threading.Thread(target=serve, daemon=True).start()


def test_the_relay_mails_a_signed_event_and_nothing_else(repository, run_adsidecar, sandbox_of_its_own):
    mails: list[str] = []
    relay_port, mail_port = free_port(), free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "NOTIFY_SECRET": SECRET,
        "MAIL_FROM": "ads@example.com",
        "MAIL_TO": "ops@example.com",
        "MAIL_PORT": str(mail_port),
        "RELAY_PORT": str(relay_port),
    }
    running = subprocess.Popen(
        [sys.executable, repository / "deploy/notify-mail"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", relay_port)) == 0:
                    break
            time.sleep(0.05)

        def notify(secret: str):
            url = f"notify.url=http://127.0.0.1:{relay_port}/"
            return run_adsidecar(
                "notify",
                "test",
                "--config",
                sandbox_of_its_own.config,
                "--set",
                url,
                "--set",
                f"notify.secret={secret}",
            )

        away = notify(SECRET)
        assert away.returncode == 1 and "503" in away.stderr, away.stderr
        mail_server(mail_port, mails)
        forged = notify("another-secret")
        assert forged.returncode == 1 and "403" in forged.stderr, forged.stderr
        assert mails == []
        sent = notify(SECRET)
        assert sent.returncode == 0, sent.stderr
        assert len(mails) == 1
        assert "Subject: adsidecar: test" in mails[0] and "this is a test" in mails[0]
    finally:
        running.kill()
        running.wait()
