"""`timm-coda push`: publish a folder on the Hub."""

import argparse
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
Publish a model's folder, as train.py or model.save_pretrained(FOLDER) leaves
it, on the Hugging Face Hub, where timm.create_model("hf-hub:USER/NAME") finds
it.

  hf auth login                                                  # once
  timm-coda push runs/coda_net_xs.digits me/digits --dry-run
  timm-coda push runs/coda_net_xs.digits me/digits --license mit
  timm-coda push runs/longer me/digits --message "Twice the epochs"

What goes there: config.json and model.safetensors, which are checked first;
explanation.png, summary.json and recipe.yaml where there are some; and
README.md, the model card. It is made from what train.py measured, unless the
folder has one: to write your own, begin with what --dry-run shows. Checkpoints
stay here.

All of it is one commit: others see the old model or the new one, never a half.
A connection that breaks is tried again; after a failure run the same command
once more, and what is uploaded already is not uploaded again.
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands, "push", "publish a model's folder on the Hugging Face Hub, with a model card", _DESCRIPTION, _run
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="with config.json and model.safetensors")
    add("repo", metavar="REPO", help="USER/NAME, or NAME under your own; made if there is none")
    add("--dry-run", action="store_true", help="upload nothing: check the folder, list the files, print the card")
    add(
        "--license", metavar="NAME", help="of the weights, for the card, such as mit (default: that of those you tuned)"
    )
    add("--private", action="store_true", help="make a new repository private (default: what its owner's setting says)")
    add("--revision", metavar="BRANCH", help="commit to this branch, which is there already (default: main)")
    add("--message", default="Upload model", metavar="TEXT", help="first line of the commit (default: Upload model)")
    add("--create-pr", action="store_true", help="open a pull request in place of committing")
    add("--token", help="that may write there (default: HF_TOKEN, or hf auth login's, which no shell's history keeps)")


def _run(args: argparse.Namespace) -> int:
    from ..hub import check_repo_id, files_to_push, push_folder

    check_repo_id(args.repo)
    files = files_to_push(args.folder, args.repo, license=args.license)
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size:>13,}  {name}")
    if args.dry_run:
        card = files["README.md"]
        print(f"\n{card.decode() if isinstance(card, bytes) else card.read_text(encoding='utf-8')}")
        return 0
    commit = push_folder(
        args.folder,
        args.repo,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.message,
        token=args.token,
        create_pr=args.create_pr,
        license=args.license,
    )
    print(f"\n{commit.pr_url or commit.commit_url}")
    if not args.create_pr:
        at = f"@{args.revision}" if args.revision else ""
        print(f'import timm, timm_coda\ntimm.create_model("hf-hub:{commit.repo_url.repo_id}{at}", pretrained=True)')
    return 0
