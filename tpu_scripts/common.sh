# shellcheck shell=bash
# Shared by the scripts of this folder: --dry-run, usage from the header, and running a command or only showing it.

# Takes --dry-run off the front of the arguments: arguments=("$@") without it, dry=1 or empty.
dry="" arguments=()
for argument in "$@"; do
    if [[ ${#arguments[@]} -eq 0 && "$argument" == "--dry-run" ]]; then dry=1; else arguments+=("$argument"); fi
done

# Prints the script's header as its help and ends, if it is asked for or there are fewer than $1 arguments.
usage() {
    if (( ${#arguments[@]} >= $1 )) && [[ "${arguments[0]:-}" != --help ]]; then return; fi
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    [[ "${arguments[0]:-}" == --help ]] && exit 0
    exit 2
}

# Runs a command, or with --dry-run prints it as a line that a shell would take.
step() {
    if [[ -n "$dry" ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
