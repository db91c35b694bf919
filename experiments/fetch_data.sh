#!/bin/sh
# Fetch Fashion-MNIST and R's mlbench data from Debian's packages into a folder, without root.
#
#     sh experiments/fetch_data.sh FOLDER && export RLKD_DATA=FOLDER
#
# Needs apt-get and dpkg-deb (any Debian or Ubuntu); apt checks the packages' signatures.
set -eu

if [ $# -ne 1 ] || [ -z "$1" ]; then
    echo "fetch_data.sh: got $# arguments; give one: the folder to fill" >&2
    exit 2
fi
for tool in apt-get dpkg-deb; do
    if ! command -v "$tool" >/dev/null; then
        echo "fetch_data.sh: no $tool here; run it on Debian or Ubuntu and copy the folder" >&2
        exit 2
    fi
done

mkdir -p "$1"
target=$(cd "$1" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
apt-get download dataset-fashion-mnist r-cran-mlbench
for package in ./*.deb; do
    dpkg-deb -x "$package" files
done
mkdir -p "$target/fashion-mnist" "$target/mlbench"
cp files/usr/share/datasets/fashion-mnist/*.gz "$target/fashion-mnist/"
cp files/usr/lib/R/site-library/mlbench/data/LetterRecognition.rda \
    files/usr/lib/R/site-library/mlbench/data/Satellite.rda "$target/mlbench/"
echo "filled $target; use it with: export RLKD_DATA=$target"
