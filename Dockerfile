# syntax=docker/dockerfile:1

# For amd64 and arm64; one builds the other without emulation:
#
#   docker buildx build --platform linux/amd64,linux/arm64 --sbom=true \
#       --build-arg VERSION=0.2.0 --build-arg COMMIT=$(git rev-parse HEAD) --tag NAME --push .
#
# The builder has the Debian release of the runtime, so that the libraries fit.
FROM --platform=$BUILDPLATFORM rust:1.95.0-slim-bookworm AS builder
# The image's own toolchain, without the components that only checks need.
ENV RUSTUP_TOOLCHAIN=1.95.0
ARG TARGETARCH
# The libraries are needed twice: some build scripts, which run here, are linked with them as well.
RUN set -eu; \
    case "$TARGETARCH" in \
    amd64) cpu=x86_64 ;; \
    arm64) cpu=aarch64 ;; \
    *) echo "there is no image for $TARGETARCH" >&2; exit 1 ;; \
    esac; \
    if [ "$TARGETARCH" = "$(dpkg --print-architecture)" ]; then \
        compiler=gcc; \
    else \
        compiler="gcc-$(echo "$cpu" | tr _ -)-linux-gnu"; \
        dpkg --add-architecture "$TARGETARCH"; \
    fi; \
    apt-get update; \
    apt-get install -y --no-install-recommends \
        gcc libc6-dev libmnl-dev libnftnl-dev pkg-config "$compiler" \
        "libc6-dev:$TARGETARCH" "libmnl-dev:$TARGETARCH" "libnftnl-dev:$TARGETARCH"; \
    rustup target add "$cpu-unknown-linux-gnu"; \
    echo "$cpu" > /cpu
WORKDIR /build
COPY . .
ARG COMMIT=unknown
RUN set -eu; cpu=$(cat /cpu); \
    export NFTLET_COMMIT="$COMMIT" \
        PKG_CONFIG_ALLOW_CROSS=1 \
        "PKG_CONFIG_LIBDIR_${cpu}_unknown_linux_gnu=/usr/lib/$cpu-linux-gnu/pkgconfig" \
        "CARGO_TARGET_$(echo "$cpu" | tr a-z A-Z)_UNKNOWN_LINUX_GNU_LINKER=$cpu-linux-gnu-gcc"; \
    cargo build --release --locked --bin nftlet --target "$cpu-unknown-linux-gnu"; \
    scripts/image-root.sh /runtime "target/$cpu-unknown-linux-gnu/release/nftlet" "$TARGETARCH"

# The C library and libgcc, and no shell.
FROM gcr.io/distroless/cc-debian12
ARG VERSION=unknown
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="nftlet" \
      org.opencontainers.image.description="Kubernetes services in nftables: a node agent that replaces kube-proxy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="gcr.io/distroless/cc-debian12" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
COPY --from=builder /runtime/ /
ENTRYPOINT ["/usr/bin/nftlet"]
