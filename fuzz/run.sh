#!/bin/sh
# Fuzzes: fuzz/run.sh [SECONDS for each target, 60 unless told] [TARGET...]
#
# The target `gateway` needs root, for a TUN device in a network namespace of its own.
# Fails if any target finds something; what it found is then in fuzz/artifacts/TARGET/. Needs no nightly compiler:
# RUSTC_BOOTSTRAP=1 lets the stable one accept the sanitizer's options. The corpus grows in fuzz/corpus/ (not kept);
# fuzz/seeds/ is what every run begins with.
set -eu
cd "$(dirname "$0")"
seconds=60
case "${1:-}" in
    '' | *[!0-9]*) ;;
    *) seconds=$1; shift ;;
esac
[ $# -gt 0 ] || set -- wire_decode provider_messages policy publish_config dns tun_packets gateway vsock_chains
export RUSTC_BOOTSTRAP=1
PATH="$PATH:$HOME/.cache/kso/tools/bin:${CARGO_HOME:-$HOME/.cargo}/bin"
cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked
cd ..
failed=
for target in "$@"; do
    corpus=fuzz/corpus/$target
    mkdir -p "$corpus"
    dictionary=
    [ ! -f "fuzz/dictionaries/$target.dict" ] || dictionary=-dict=fuzz/dictionaries/$target.dict
    # No single allocation of more than 16 MB: every length that a message claims is bounded.
    cargo fuzz run "$target" "$corpus" "fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -max_len=66000 -len_control=20 -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=16 \
        -print_final_stats=1 -verbosity=1 $dictionary || failed="$failed $target"
done
if [ -n "$failed" ]; then
    echo "fuzz: found something in:$failed (see fuzz/artifacts)" >&2
    exit 1
fi
