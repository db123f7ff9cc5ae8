# syntax=docker/dockerfile:1

# The builder has the Debian release of the runtime, so that the libraries fit.
FROM rust:1.95.0-slim-bookworm AS builder
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libmnl-dev libnftnl-dev pkg-config \
    && rm -rf /var/lib/apt/lists/*
# The image's own toolchain, without the components that only checks need.
ENV RUSTUP_TOOLCHAIN=1.95.0
WORKDIR /build
COPY . .
RUN cargo build --release --locked --bin nftlet
# The runtime image has the C library and libgcc; these two are what it lacks.
RUN libraries="/runtime/usr/lib/$(gcc -print-multiarch)" \
    && mkdir -p "$libraries" \
    && cp --dereference --no-target-directory \
        "/usr/lib/$(gcc -print-multiarch)/libmnl.so.0" "$libraries/libmnl.so.0" \
    && cp --dereference --no-target-directory \
        "/usr/lib/$(gcc -print-multiarch)/libnftnl.so.11" "$libraries/libnftnl.so.11" \
    && install -D target/release/nftlet /runtime/usr/bin/nftlet \
    && ldd /runtime/usr/bin/nftlet

FROM gcr.io/distroless/cc-debian12
ARG VERSION=unknown
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="nftlet" \
      org.opencontainers.image.description="Kubernetes services in nftables: a node agent that replaces kube-proxy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
COPY --from=builder /runtime/ /
ENTRYPOINT ["/usr/bin/nftlet"]
