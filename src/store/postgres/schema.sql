-- adsidecar creates these tables at startup if one is missing. A role that may not create tables needs SELECT, INSERT,
-- UPDATE and DELETE on all four.

-- One row per user. A logout removes the record but keeps the row: the user's generation never decreases, so that a write
-- based on an earlier generation cannot succeed.
CREATE TABLE IF NOT EXISTS adsidecar_grants (
    user_id text COLLATE "C" PRIMARY KEY,
    record text,
    generation bigint NOT NULL,
    changed_at timestamptz NOT NULL,
    lease_owner text,
    lease_until timestamptz
);
CREATE INDEX IF NOT EXISTS adsidecar_grants_changed_at ON adsidecar_grants (changed_at);

-- Pending logins, by the hash of their state.
CREATE TABLE IF NOT EXISTS adsidecar_logins (
    state text PRIMARY KEY,
    sealed text NOT NULL,
    since timestamptz NOT NULL
);

-- Pending grants, by the hash of their one-time id.
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
