-- Migration 3: what all processes have learned about Amazon's limits. It runs after schema.sql, in one transaction.

-- One row per bucket of a client, such as `na/reporting/create`. Times are seconds of the Unix epoch by the database's
-- clock. epoch: how often the rate was halved; 0 if no process has said so yet. ceiling, cubic, resumed, refused,
-- streak: see `Learned` in src/throttle/law.rs. pods: by process, the calls per second that it could send, those that it
-- sends, the most that it sent within a second, and when it said so.
CREATE TABLE IF NOT EXISTS adsidecar_throttle (
    client text NOT NULL,
    bucket text NOT NULL,
    epoch bigint NOT NULL,
    ceiling double precision NOT NULL,
    cubic double precision NOT NULL,
    resumed double precision NOT NULL,
    refused double precision NOT NULL,
    streak integer NOT NULL,
    pods jsonb NOT NULL,
    changed double precision NOT NULL,
    PRIMARY KEY (client, bucket)
);

INSERT INTO adsidecar_notes (name, value) VALUES ('migration', '3')
    ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE adsidecar_notes.value::int < 3;
