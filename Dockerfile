# syntax=docker/dockerfile:1
# adsidecar as an image: one binary on distroless, no shell, nobody's root.
#   docker build --tag adsidecar:0.1.0 .
# Both bases are pinned by version. For a pin by digest put what `docker buildx imagetools inspect IMAGE` says behind
# the names: it could not be asked where this was written. It builds for the machine's own architecture; only amd64 was
# tried. The builder's Debian is the final stage's (bookworm is 12), so that the binary finds the glibc that it was
# linked with.

FROM rust:1.95.0-slim-bookworm AS build
# Set by BuildKit to the architecture that is built for: two that build at once do not share a cache of crates.
ARG TARGETARCH
WORKDIR /build

# The dependencies in a layer of their own: it lasts as long as the lock file. Cargo wants the sources that Cargo.toml
# names to exist, so they are empty here. The sandbox is a member of the workspace; nothing of it is built.
COPY Cargo.toml Cargo.lock ./
COPY tests/sandbox/Cargo.toml tests/sandbox/
# What serves requests is laid out by this profile (tests/bench/serving-profile), the dependencies too.
COPY src/serving.profdata src/
ENV RUSTFLAGS="-Cprofile-use=/build/src/serving.profdata -Cllvm-args=-split-machine-functions"
RUN --mount=type=cache,id=cargo-registry-${TARGETARCH},target=/usr/local/cargo/registry \
    mkdir -p src tests/sandbox/src/bin \
    && echo 'fn main() {}' | tee src/main.rs src/build.rs > tests/sandbox/src/bin/adsidecar-sandbox.rs \
    && touch src/lib.rs tests/sandbox/src/lib.rs \
    && cargo build --package adsidecar --profile dist --locked --bin adsidecar

# COPY keeps the files' dates, which lie before those of the empty sources' build: without the touch cargo would take
# the empty program for up to date and ship it.
COPY src ./src
RUN --mount=type=cache,id=cargo-registry-${TARGETARCH},target=/usr/local/cargo/registry \
    touch src/lib.rs src/main.rs src/build.rs \
    && cargo build --package adsidecar --profile dist --locked --bin adsidecar \
    && mkdir -p /out/data

# libc, libm and libgcc_s are all that the binary needs; tests/packaging/dockerfile_test.py holds it to that.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="adsidecar" \
      org.opencontainers.image.description="Plain HTTP to localhost in, an authenticated Amazon Ads call out" \
      org.opencontainers.image.licenses="Apache-2.0"

COPY --from=build /build/target/dist/adsidecar /adsidecar
# The store (store.path is data/adsidecar.sled, below the working directory). It holds the grants: mount a volume here.
COPY --from=build --chown=65532:65532 /out/data /data
WORKDIR /
VOLUME ["/data"]

# A number, because Kubernetes' runAsNonRoot cannot tell whether a name is root.
USER 65532:65532

# proxy and admin. Both listen on loopback: share the app's network namespace (one pod, or docker run --network
# container:app) instead of publishing ports.
EXPOSE 8001 9464

# No HEALTHCHECK: Kubernetes ignores it, and `adsidecar health [--ready]` is the probe for whoever runs one.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/adsidecar"]
