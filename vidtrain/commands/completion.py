"""`vidtrain completion bash|zsh|fish`: print a script that completes verbs, groups and keys.

The first word is completed from the table of verbs in the script itself; for the words after it the
script asks Hydra, which knows only `vidtrain key=value ...`: the verb is left out of the line that
it gets. Where Hydra has nothing to say of a value, file names are offered.
"""

from __future__ import annotations

import shlex
import sys

SHELLS = ("bash", "zsh", "fish")

USAGE = """usage: vidtrain completion bash|zsh|fish

  bash   eval "$(vidtrain completion bash)"      in ~/.bashrc
  zsh    eval "$(vidtrain completion zsh)"       in ~/.zshrc
  fish   vidtrain completion fish | source       in ~/.config/fish/config.fish
"""

# bash hands over the line up to the cursor. It breaks words at = and : and wants back only what
# follows the last break ($2 is that part), so the rest of each answer is cut off.
BASH = r"""_vidtrain() {
    local line=${COMP_LINE:0:COMP_POINT} word= rest answers answer
    local -a words
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] || { word=${words[-1]}; unset "words[-1]"; }
    local -i cut=$((${#word} - ${#2}))
    COMPREPLY=()
    case ${#words[@]} in
        0) return ;;
        1) COMPREPLY=($(compgen -W "@VERBS@" -- "$word")); return ;;
    esac
    if [[ ${words[1]} == completion ]]; then
        COMPREPLY=($(compgen -W "@SHELLS@" -- "$word"))
        return
    fi
    if [[ ${words[1]} == report ]]; then
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -d -- "$word")
        return
    fi
    rest=${line#*"${words[0]}"}
    rest=${rest#*"${words[1]}"}
    answers=$(COMP_LINE="vidtrain$rest" "${words[0]/#\~/$HOME}" "${words[1]}" \
        -sc query=bash 2>/dev/null </dev/null)
    for answer in $answers; do
        [[ $answer == "$word"* && $answer != "$word" ]] && COMPREPLY+=("${answer:cut}")
    done
    if ((${#COMPREPLY[@]} == 0)) && [[ $word == *=* ]]; then
        compopt -o filenames
        while IFS= read -r answer; do
            answer=${word%%=*}=$answer
            COMPREPLY+=("${answer:cut}")
        done < <(compgen -f -- "${word#*=}")
    elif ((${#COMPREPLY[@]} == 1)) && [[ ${COMPREPLY[0]} == *[=./] ]]; then
        compopt -o nospace
    fi
}
complete -F _vidtrain vidtrain
"""

ZSH = r"""#compdef vidtrain
_vidtrain() {
    local -a verbs shells answers
    verbs=(
@ZSH_VERBS@
    )
    shells=(@SHELLS@)
    if ((CURRENT == 2)); then
        _describe verb verbs
        return
    elif [[ $words[2] == completion ]]; then
        compadd -a shells
        return
    elif [[ $words[2] == report ]]; then
        _files -/
        return
    fi
    local line="vidtrain ${(j: :)words[3,CURRENT-1]} $PREFIX"
    answers=(${=$(COMP_LINE=$line ${~words[1]} $words[2] -sc query=bash 2>/dev/null </dev/null)})
    answers=(${answers:#$PREFIX})
    if ((${#answers})); then
        compadd -Q -S '' -- ${(M)answers:#*[=./]}
        compadd -Q -- ${answers:#*[=./]}
    elif compset -P '*='; then
        _files
    fi
}
if [[ $funcstack[1] == _vidtrain ]]; then
    _vidtrain "$@"
else
    (($+functions[compdef])) || { autoload -Uz compinit && compinit; }
    compdef _vidtrain vidtrain
fi
"""

FISH = r"""function __vidtrain_answers
    set -l words (commandline -opc)
    set -l command $words[1..2]
    set -e words[1..2]
    set -lx COMP_LINE "vidtrain $words "(commandline -ct)
    $command -sc query=fish 2>/dev/null </dev/null
end
function __vidtrain_at
    test (count (commandline -opc)) -$argv[1] $argv[2]
end
complete -c vidtrain -f
@FISH_VERBS@
complete -c vidtrain -n '__vidtrain_at eq 2; and __fish_seen_subcommand_from completion' -a '@SHELLS@'
complete -c vidtrain -n '__vidtrain_at ge 2; and not __fish_seen_subcommand_from completion report' \
    -a '(__vidtrain_answers)'
complete -c vidtrain -n '__vidtrain_at ge 2; and __fish_seen_subcommand_from report' \
    -a '(__fish_complete_directories (commandline -ct))'
complete -c vidtrain -F -n 'string match -qr "^(ckpt|run|input|output|resume|data\.(root|annotations))=" -- (commandline -ct)'
"""


def main(args: list[str]) -> int:
    """Print the script for a shell; 2 when there is none for it."""
    if args in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if len(args) != 1 or args[0] not in SHELLS:
        print(USAGE, end="", file=sys.stderr)
        return 2
    print(script(args[0]), end="")
    return 0


def script(shell: str) -> str:
    """Write the completion script of `bash`, `zsh` or `fish`."""
    from vidtrain.cli import VERBS

    zsh = [f"        {_quoted(f'{verb}:{line}', shell)}" for verb, line in VERBS.items()]
    fish = [
        f"complete -c vidtrain -n '__vidtrain_at eq 1' -a {verb} -d {_quoted(line, shell)}"
        for verb, line in VERBS.items()
    ]
    return (
        {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
        .replace("@VERBS@", " ".join(VERBS))
        .replace("@SHELLS@", " ".join(SHELLS))
        .replace("@ZSH_VERBS@", "\n".join(zsh))
        .replace("@FISH_VERBS@", "\n".join(fish))
    )


def _quoted(text: str, shell: str) -> str:
    """Quote a text, each shell in its own way."""
    if shell == "fish":
        text = text.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{text}'"
    return shlex.quote(text)
