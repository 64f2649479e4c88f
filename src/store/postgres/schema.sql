-- The tables, and the one rule by which a user's row changes. adsidecar runs this file at startup if a table is missing
-- or the note `migration` is lower than the last number: in one transaction with throttle.sql, which follows, and under
-- an advisory lock. Every statement may be repeated, and each migration only adds, so that processes of the previous
-- version keep working during a rolling update. A role that may not create tables needs SELECT, INSERT, UPDATE and
-- DELETE on all seven.
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = 0;
SELECT pg_advisory_xact_lock(4837205517302918401);
-- Requests wait behind a change of a table that waits itself: it rather fails, and is tried again.
SET LOCAL lock_timeout = '2s';

-- Migration 1.

-- One row per user. A logout removes the record but keeps the row: the user's generation never decreases, so that a
-- write based on an earlier generation cannot succeed.
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

-- Migration 2.

-- change: the number of the row's last change, by which processes follow changes without comparing rows. epoch: when
-- the user last logged in or out, in microseconds by the database's clock; a refresh does not change it. Of two states
-- of a user the one with the higher epoch is the newer one, whatever their generations: after a failover that lost
-- commits, generations may repeat, and a login or logout that was lost is still older than one after it. described: a
-- hash of the record that the following columns describe; NULL if a process has yet to describe it. sealed_with: the
-- fingerprint of the key that seals the record; `unknown` or `damaged` if it yields no grant. expires_at, updated_at,
-- consented_at, used_at: as in the record, whose seal alone makes them trustworthy. They are for lists and counts.
-- due_at: when the next background refresh is due; NULL if the user is idle. refused, failure, attempts, retry_at: how
-- the last refresh of this generation failed: Login with Amazon refused the grant, or could not be asked; how many have
-- failed; and when the next process may ask. accounts (migration 4): the version of the accounts that were found for
-- the user, so that who follows the changes of this table hears of those too. news (migration 5): the number of the
-- last change that every process hears of at once: each but a refresh that was due, for which those look who hold the
-- grant. So a poll reads no refreshes, which are nearly all changes. The version before polls by `change`; its index
-- can go when no process does. Migration 6: what that version refreshes is news, as it does not say whether it was due.
-- doubted (migration 7): the generation of which a refresh token was sent to Login with Amazon and the response may be
-- lost, until a refresh stores the next generation, or the grant is refused.
CREATE SEQUENCE IF NOT EXISTS adsidecar_changes;
ALTER TABLE adsidecar_grants
    ADD COLUMN IF NOT EXISTS change bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS described bigint,
    ADD COLUMN IF NOT EXISTS sealed_with text,
    ADD COLUMN IF NOT EXISTS expires_at timestamptz,
    ADD COLUMN IF NOT EXISTS updated_at timestamptz,
    ADD COLUMN IF NOT EXISTS consented_at timestamptz,
    ADD COLUMN IF NOT EXISTS used_at timestamptz,
    ADD COLUMN IF NOT EXISTS due_at timestamptz,
    ADD COLUMN IF NOT EXISTS refused text,
    ADD COLUMN IF NOT EXISTS failure text,
    ADD COLUMN IF NOT EXISTS attempts integer,
    ADD COLUMN IF NOT EXISTS retry_at timestamptz,
    ADD COLUMN IF NOT EXISTS accounts bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS news bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS doubted bigint;
CREATE INDEX IF NOT EXISTS adsidecar_grants_change ON adsidecar_grants (change);
CREATE INDEX IF NOT EXISTS adsidecar_grants_news ON adsidecar_grants (news) WHERE news > 0;
CREATE INDEX IF NOT EXISTS adsidecar_grants_due ON adsidecar_grants (due_at) WHERE record IS NOT NULL;
CREATE INDEX IF NOT EXISTS adsidecar_grants_undescribed ON adsidecar_grants (user_id)
    WHERE record IS NOT NULL AND described IS NULL;
CREATE INDEX IF NOT EXISTS adsidecar_grants_unknown ON adsidecar_grants (user_id)
    WHERE record IS NOT NULL AND sealed_with = 'unknown';
CREATE INDEX IF NOT EXISTS adsidecar_grants_failing ON adsidecar_grants (user_id)
    WHERE record IS NOT NULL AND (refused IS NOT NULL OR failure IS NOT NULL);

-- Numbers every change, whoever makes it: this version, the previous one, or a person with psql. It runs with the
-- rights of its owner, so that a role with access to the tables alone needs no right on the sequence. A lease is no
-- change, and neither is a record that is only sealed with another key. Each change is news, unless it is a refresh and
-- says so itself, by the number -1.
CREATE OR REPLACE FUNCTION adsidecar_number_change() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.change := nextval('adsidecar_changes');
        NEW.news := NEW.change;
    ELSIF (NEW.record IS NULL) = (OLD.record IS NULL) AND NEW.generation = OLD.generation AND NEW.epoch = OLD.epoch
        AND NEW.accounts <> OLD.accounts THEN
        -- Only the accounts that were found have changed: how the last refresh failed stays true.
        NEW.change := nextval('adsidecar_changes');
        NEW.news := NEW.change;
    ELSIF (NEW.record IS NULL) <> (OLD.record IS NULL) OR NEW.generation <> OLD.generation
        OR NEW.epoch <> OLD.epoch THEN
        NEW.change := nextval('adsidecar_changes');
        NEW.news := CASE WHEN NEW.news = -1 AND (NEW.record IS NULL) = (OLD.record IS NULL) AND NEW.epoch = OLD.epoch
            THEN OLD.news ELSE NEW.change END;
        IF (NEW.record IS NULL) <> (OLD.record IS NULL) AND NEW.epoch = OLD.epoch THEN
            -- The previous version, or a person, logged the user in or out.
            NEW.epoch := greatest(OLD.epoch + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint);
        END IF;
        NEW.refused := NULL;
        NEW.failure := NULL;
        NEW.attempts := NULL;
        NEW.retry_at := NULL;
    END IF;
    IF NEW.record IS NULL OR NEW.described IS DISTINCT FROM hashtextextended(NEW.record, 0) THEN
        NEW.described := NULL;
        NEW.sealed_with := NULL;
        NEW.due_at := NULL;
    END IF;
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS adsidecar_number_insert ON adsidecar_grants;
CREATE TRIGGER adsidecar_number_insert BEFORE INSERT ON adsidecar_grants
    FOR EACH ROW EXECUTE FUNCTION adsidecar_number_change();
DROP TRIGGER IF EXISTS adsidecar_number_update ON adsidecar_grants;
CREATE TRIGGER adsidecar_number_update BEFORE UPDATE OF record, generation, epoch, accounts ON adsidecar_grants
    FOR EACH ROW WHEN (NEW.record IS DISTINCT FROM OLD.record OR NEW.generation <> OLD.generation
                       OR NEW.epoch <> OLD.epoch OR NEW.accounts <> OLD.accounts)
    EXECUTE FUNCTION adsidecar_number_change();

-- The rule: the only statement by which a process stores or removes a user's grant. `seen` is the generation of the row
-- that the decision is based on, 0 for no row; NULL for a logout, which a person wants whatever is stored. The write
-- happens only if that is still the stored generation, and if neither generation nor epoch would decrease. A NULL
-- generation is the next one. `age` says how many seconds ago a person logged in or out, for a write that makes a new
-- epoch: one that was delayed changes nothing if somebody has logged in or out since. Without an age the epoch is
-- `epoch`, or the stored one if that is NULL. Returns whether the row was written, whether there was a grant, and the
-- version of the row now.
--
-- News takes its change number while it holds the advisory lock, with the row locked first. So these numbers become
-- visible in their order, and a process that has read up to a number has missed none below it. A refresh that was due
-- is no news and takes no such lock: who holds the grant reads the row then, and before its token ends. One is news
-- nevertheless if it came before others look for it: its writer says so, or says nothing (the version before
-- migration 5), or others wait for `retry_at`.
--
-- `about` is a JSON object with the columns that describe the record, and `early`; NULL if another process has to
-- describe it.
CREATE OR REPLACE FUNCTION adsidecar_write(
    p_user text, p_record text, p_generation bigint, p_epoch bigint, p_age double precision, p_seen bigint,
    p_about text, p_patience text
) RETURNS TABLE (written boolean, was_present boolean, now_generation bigint, now_epoch bigint)
LANGUAGE plpgsql AS $$
DECLARE
    about jsonb := p_about::jsonb;
    was_generation bigint;
    was_epoch bigint;
    there boolean;
    is_news boolean;
BEGIN
    PERFORM set_config('lock_timeout', p_patience, true);
    SELECT g.generation, g.epoch, g.record IS NOT NULL, coalesce(g.retry_at > clock_timestamp(), false)
        INTO was_generation, was_epoch, was_present, is_news
        FROM adsidecar_grants AS g WHERE g.user_id = p_user FOR UPDATE;
    there := FOUND;
    was_generation := coalesce(was_generation, 0);
    was_epoch := coalesce(was_epoch, 0);
    was_present := coalesce(was_present, false);
    now_generation := coalesce(p_generation, was_generation + 1);
    now_epoch := coalesce(p_epoch, was_epoch);
    IF p_age IS NOT NULL THEN
        now_epoch := ((extract(epoch FROM clock_timestamp()) - p_age) * 1000000)::bigint;
    END IF;
    IF p_age = 0 THEN
        now_epoch := greatest(now_epoch, was_epoch + 1);
    END IF;
    written := coalesce(p_seen = was_generation, true) AND now_generation > was_generation AND now_epoch >= was_epoch
        AND (p_age IS NULL OR now_epoch > was_epoch);
    IF written THEN
        is_news := coalesce(is_news, true) OR now_epoch > was_epoch OR was_present <> (p_record IS NOT NULL)
            OR about IS NULL OR coalesce((about->>'early')::boolean, true);
        IF is_news THEN
            PERFORM pg_advisory_xact_lock(4837205517302918402);
        END IF;
        IF there THEN
            UPDATE adsidecar_grants AS g SET record = p_record, generation = now_generation, epoch = now_epoch,
                news = CASE WHEN is_news THEN g.news ELSE -1 END,
                changed_at = clock_timestamp(), lease_owner = NULL, lease_until = NULL,
                described = CASE WHEN about IS NOT NULL THEN hashtextextended(p_record, 0) END,
                sealed_with = about->>'sealed_with', expires_at = (about->>'expires_at')::timestamptz,
                updated_at = (about->>'updated_at')::timestamptz,
                consented_at = (about->>'consented_at')::timestamptz, used_at = (about->>'used_at')::timestamptz,
                due_at = (about->>'due_at')::timestamptz WHERE g.user_id = p_user;
        ELSE
            INSERT INTO adsidecar_grants (user_id, record, generation, epoch, changed_at, described, sealed_with,
                    expires_at, updated_at, consented_at, used_at, due_at)
                VALUES (p_user, p_record, now_generation, now_epoch, clock_timestamp(),
                    CASE WHEN about IS NOT NULL THEN hashtextextended(p_record, 0) END, about->>'sealed_with',
                    (about->>'expires_at')::timestamptz, (about->>'updated_at')::timestamptz,
                    (about->>'consented_at')::timestamptz, (about->>'used_at')::timestamptz,
                    (about->>'due_at')::timestamptz)
                ON CONFLICT (user_id) DO NOTHING;
            written := FOUND;
        END IF;
        IF now_epoch > was_epoch THEN
            PERFORM pg_notify('adsidecar', '');
        END IF;
    END IF;
    IF p_record IS NULL AND written THEN
        DELETE FROM adsidecar_waiting AS w WHERE w.user_id = p_user;
        DELETE FROM adsidecar_accounts AS a WHERE a.user_id = p_user;
    END IF;
    IF NOT written THEN
        now_generation := was_generation;
        now_epoch := was_epoch;
    END IF;
    RETURN NEXT;
END $$;

-- Migration 4. (Migration 3 is throttle.sql.)

-- The accounts that were found for each user, sealed. version: the number of the last change, from the sequence of all
-- changes. indexed_at: the changed_at of what adsidecar_slugs lists; another one means that the previous version, which
-- knows no such table, has written. search_at: when Amazon is asked again.
CREATE TABLE IF NOT EXISTS adsidecar_accounts (
    user_id text COLLATE "C" PRIMARY KEY,
    sealed text NOT NULL,
    changed_at timestamptz NOT NULL
);
ALTER TABLE adsidecar_accounts
    ADD COLUMN IF NOT EXISTS version bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS indexed_at timestamptz,
    ADD COLUMN IF NOT EXISTS search_at timestamptz;
CREATE INDEX IF NOT EXISTS adsidecar_accounts_unindexed ON adsidecar_accounts (user_id)
    WHERE indexed_at IS DISTINCT FROM changed_at;
CREATE INDEX IF NOT EXISTS adsidecar_accounts_search ON adsidecar_accounts (search_at);

-- Which user each account belongs to, by the slug that selects it: in the clear, as in logs and metrics, because it is
-- looked up and listed. name is in lower case, country in upper case. Ids are in the sealed list alone.
CREATE TABLE IF NOT EXISTS adsidecar_slugs (
    slug text COLLATE "C" PRIMARY KEY,
    user_id text COLLATE "C" NOT NULL REFERENCES adsidecar_accounts ON DELETE CASCADE,
    name text NOT NULL,
    country text,
    kind text NOT NULL
);
CREATE INDEX IF NOT EXISTS adsidecar_slugs_user ON adsidecar_slugs (user_id);

-- Numbers every change of the accounts, whoever makes it, and tells those who follow adsidecar_grants. A list that is
-- only sealed with another key has not changed.
CREATE OR REPLACE FUNCTION adsidecar_number_accounts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    NEW.version := nextval('adsidecar_changes');
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION adsidecar_tell_accounts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        UPDATE adsidecar_grants SET accounts = nextval('adsidecar_changes') WHERE user_id = OLD.user_id;
    ELSE
        UPDATE adsidecar_grants SET accounts = NEW.version WHERE user_id = NEW.user_id;
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS adsidecar_accounts_insert ON adsidecar_accounts;
CREATE TRIGGER adsidecar_accounts_insert BEFORE INSERT ON adsidecar_accounts
    FOR EACH ROW EXECUTE FUNCTION adsidecar_number_accounts();
DROP TRIGGER IF EXISTS adsidecar_accounts_update ON adsidecar_accounts;
CREATE TRIGGER adsidecar_accounts_update BEFORE UPDATE OF changed_at ON adsidecar_accounts
    FOR EACH ROW WHEN (NEW.changed_at <> OLD.changed_at) EXECUTE FUNCTION adsidecar_number_accounts();
DROP TRIGGER IF EXISTS adsidecar_accounts_told ON adsidecar_accounts;
CREATE TRIGGER adsidecar_accounts_told AFTER INSERT OR DELETE OR UPDATE OF changed_at ON adsidecar_accounts
    FOR EACH ROW EXECUTE FUNCTION adsidecar_tell_accounts();

-- Stores the accounts of a user, and lists them by their slugs. `seen` is the version that they are based on, 0 for
-- none.
-- Nothing is stored if another process has stored others since, if the user has no grant (any more), or if a slug
-- belongs to another user. Returns the version now, NULL if nothing was stored, and the slugs that are taken.
CREATE OR REPLACE FUNCTION adsidecar_save_accounts(
    p_user text, p_sealed text, p_slugs text, p_seen bigint, p_search_at double precision
) RETURNS TABLE (stored_version bigint, is_logged_out boolean, taken text[])
LANGUAGE plpgsql AS $$
DECLARE
    wanted jsonb := p_slugs::jsonb;
    was bigint;
    moment timestamptz := clock_timestamp();
BEGIN
    PERFORM FROM adsidecar_grants AS g WHERE g.user_id = p_user AND g.record IS NOT NULL FOR UPDATE;
    is_logged_out := NOT FOUND;
    -- Two processes must not give one slug to two users.
    PERFORM pg_advisory_xact_lock(4837205517302918403);
    SELECT a.version INTO was FROM adsidecar_accounts AS a WHERE a.user_id = p_user;
    SELECT array_agg(s.slug) INTO taken FROM jsonb_to_recordset(wanted) AS w (slug text)
        JOIN adsidecar_slugs AS s ON s.slug = w.slug AND s.user_id <> p_user;
    IF NOT is_logged_out AND coalesce(was, 0) = p_seen AND taken IS NULL THEN
        INSERT INTO adsidecar_accounts AS a (user_id, sealed, changed_at, indexed_at, search_at)
            VALUES (p_user, p_sealed, moment, moment, to_timestamp(p_search_at))
            ON CONFLICT (user_id) DO UPDATE SET sealed = excluded.sealed, changed_at = excluded.changed_at,
                indexed_at = excluded.indexed_at, search_at = excluded.search_at
            RETURNING a.version INTO stored_version;
        DELETE FROM adsidecar_slugs AS s WHERE s.user_id = p_user
            AND s.slug NOT IN (SELECT w.slug FROM jsonb_to_recordset(wanted) AS w (slug text));
        INSERT INTO adsidecar_slugs AS s (slug, user_id, name, country, kind)
            SELECT w.slug, p_user, w.name, w.country, w.kind
            FROM jsonb_to_recordset(wanted) AS w (slug text, name text, country text, kind text)
            ON CONFLICT (slug) DO UPDATE SET name = excluded.name, country = excluded.country, kind = excluded.kind;
    END IF;
    RETURN NEXT;
END $$;

INSERT INTO adsidecar_notes (name, value) VALUES ('migration', '7')
    ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE adsidecar_notes.value::int < 7;
