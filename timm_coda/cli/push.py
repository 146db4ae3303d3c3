"""`timm-coda push`: publish a model folder on the Hub."""

import argparse
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
Publish a model folder, written by train.py or model.save_pretrained(FOLDER), on
the Hugging Face Hub, to be loaded by timm.create_model("hf-hub:USER/NAME").

  hf auth login                                                  # once
  timm-coda push runs/coda_net_xs.digits me/digits --dry-run
  timm-coda push runs/coda_net_xs.digits me/digits --license mit
  timm-coda push runs/longer me/digits --message "Twice the epochs"

Uploaded files: config.json and model.safetensors, which are checked first;
explanation.png, summary.json and recipe.yaml if they exist; and README.md, the
model card. If the folder has no card, it is generated from the results of
train.py; to write your own, start from the output of --dry-run. Checkpoints are
not uploaded.

All files are uploaded in one commit, so others see the old or the new model,
never a mix. Broken connections are retried. After a failure, run the same
command again: files that are already uploaded are skipped.
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands, "push", "publish a model on the Hugging Face Hub, with a model card", _DESCRIPTION, _run
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder with config.json and model.safetensors")
    add("repo", metavar="REPO", help="USER/NAME, or NAME in your account; created if missing")
    add("--dry-run", action="store_true", help="upload nothing: check the folder, list the files, print the card")
    add(
        "--license",
        metavar="NAME",
        help="license of the weights, such as mit (default: that of the pretrained weights)",
    )
    add("--private", action="store_true", help="make a new repository private (default: the owner's setting)")
    add("--revision", metavar="BRANCH", help="commit to this existing branch (default: main)")
    add("--message", default="Upload model", metavar="TEXT", help="title of the commit (default: Upload model)")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--token", help="token with write access (default: HF_TOKEN or hf auth login; not in shell history)")


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
