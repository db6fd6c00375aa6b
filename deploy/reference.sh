#!/usr/bin/env bash
# Writes docs/reference anew, from what the programs say of themselves. Argument: their folder.
set -euo pipefail
bin="$(cd "$1" && pwd)"
cd "$(dirname "$0")/../docs/reference"
{
    printf '# Commands\n\nAll commands and options of the four programs, as `make reference` writes it from their definitions.\n'
    printf 'What a page says, `--help` says too; a wheel and an archive have the same as pages for `man`.\n\n'
    for program in fleet coordinator worker fleet-rank; do "$bin/$program" manual; done
} >commands.md
{
    printf '# Fields of a job file\n\nAs `fleet fields` prints them and `make reference` writes them. TOML, YAML or JSON; a dotted key is one in a table.\n'
    printf '`fleet config JOB` prints a job with every default.\n\n'
    "$bin/fleet" fields
} >job.md
