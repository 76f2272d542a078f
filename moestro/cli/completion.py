"""moestro completion: scripts by which a shell completes verbs, options and values; paths it knows."""

import argparse
from argparse import Namespace

from moestro.cli.arguments import Parser

BASH = """\
# moestro: completion for bash
_moestro() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{verbs}"
    else
        case "${{COMP_WORDS[1]}}:$before" in
{values}
        *)
            case "${{COMP_WORDS[1]}}:$current" in
{options}
            esac ;;
        esac
    fi
    # nothing of ours to offer: the shell then completes paths
    [ -z "$words" ] || COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o bashdefault -o default -F _moestro moestro
"""
ZSH = """\
#compdef moestro
# moestro: completion for zsh
_moestro() {{
    local -a verbs
    verbs=(
{verbs}
    )
    if (( CURRENT == 2 )); then
        _describe -t verbs verb verbs
        return
    fi
    case "${{words[2]}}" in
{arguments}
    esac
}}
if [ "$funcstack[1]" = _moestro ]; then _moestro "$@"; else compdef _moestro moestro; fi
"""


def add_arguments(parser: Parser) -> None:
    """SHELL"""
    parser.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="bash or zsh")


def run(arguments: Namespace) -> int:
    """Print a script by which bash or zsh complete verbs, options, their values and paths.

    examples:
      eval "$(moestro completion bash)"   # a line for ~/.bashrc
      eval "$(moestro completion zsh)"    # a line for ~/.zshrc, after compinit
    """
    print(_bash() if arguments.shell == "bash" else _zsh(), end="")
    return 0


def _options(name: str) -> list[argparse.Action]:
    from moestro.cli.dispatch import parser_of

    return [action for action in parser_of(name)._actions if action.option_strings]


def _bash() -> str:
    from moestro.cli.dispatch import VERBS

    values, options = [], []
    for name in VERBS:
        own = _options(name)
        for action in own:
            if action.choices:
                patterns = "|".join(f"{name}:{option}" for option in action.option_strings)
                values.append(f'        {patterns}) words="{" ".join(map(str, action.choices))}" ;;')
        names = " ".join(option for action in own for option in action.option_strings)
        options.append(f'            {name}:-*) words="{names}" ;;')
    shells = '        completion:completion) words="bash zsh" ;;'
    verbs = " ".join([*VERBS, "--help", "--version"])
    return BASH.format(verbs=verbs, values="\n".join([*values, shells]), options="\n".join(options))


def _zsh() -> str:
    from moestro.cli.dispatch import VERBS, summary

    verbs = "\n".join(f"        {_quoted(f'{name}:{summary(name)}')}" for name in VERBS)
    cases = []
    for name in VERBS:
        specs = [_spec(action, option) for action in _options(name) for option in action.option_strings]
        rest = "'1:shell:(bash zsh)'" if name == "completion" else "'*:path:_files'"
        lines = " \\\n".join(f"            {spec}" for spec in [*specs, rest])
        cases.append(f"    {name})\n        shift words; (( CURRENT-- ))\n        _arguments \\\n{lines} ;;")
    return ZSH.format(verbs=verbs, arguments="\n".join(cases))


def _spec(action: argparse.Action, option: str) -> str:
    """An option as `_arguments` of zsh reads it: its name, what it says, its values."""
    said = (action.help or "").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    if action.nargs == 0:
        return _quoted(f"{option}[{said}]")
    values = f"({' '.join(map(str, action.choices))})" if action.choices else "_files"
    repeated = "*" if isinstance(action, argparse._AppendAction) else ""
    return _quoted(f"{repeated}{option}[{said}]{'::' if action.nargs == '?' else ':'}value:{values}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
