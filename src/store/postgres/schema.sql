-- What adsidecar makes at its start where it is not there. A role that may not make it needs SELECT, INSERT, UPDATE and
-- DELETE on these four tables.

-- One row per user, kept without its record after a logout: the generation of a user never goes back, so that no late
-- write finds the one that it expects.
CREATE TABLE IF NOT EXISTS adsidecar_grants (
    user_id text COLLATE "C" PRIMARY KEY,
    record text,
    generation bigint NOT NULL,
    changed_at timestamptz NOT NULL,
    lease_owner text,
    lease_until timestamptz
);
CREATE INDEX IF NOT EXISTS adsidecar_grants_changed_at ON adsidecar_grants (changed_at);

-- Logins that have begun, by the hash of their state.
CREATE TABLE IF NOT EXISTS adsidecar_logins (
    state text PRIMARY KEY,
    sealed text NOT NULL,
    since timestamptz NOT NULL
);

-- Grants that are exchanged and not in use yet, by the hash of their one-time id.
CREATE TABLE IF NOT EXISTS adsidecar_waiting (
    id text PRIMARY KEY,
    user_id text COLLATE "C" NOT NULL,
    sealed text NOT NULL,
    claimed_until timestamptz NOT NULL
);

CREATE TABLE IF NOT EXISTS adsidecar_notes (
    name text PRIMARY KEY,
    value text NOT NULL
);
