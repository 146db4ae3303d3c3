"""Train an image classifier that explains itself.

    python train.py                                      # handwritten digits, on a laptop in two minutes, offline
    python train.py --data uoft-cs/cifar10               # CoDA-Net S with the paper's settings: wants a GPU
    python train.py --data path/to/images --model coda_net_xs --img-size 64 --epochs 50       # train/cat/1.png, ...
    python train.py --config recipe.yaml --lr 1e-3       # a recipe, with one thing changed
    python train.py --resume runs/my-run                 # go on exactly where a run was stopped or killed
    accelerate launch --multi_gpu --num_processes 2 train.py             # two processes, on GPUs or without one

The output folder is a model, of the best epoch: timm.create_model("local-dir:FOLDER", pretrained=True) after `import
timm_coda`. Beside it: explanation.png, summary.json, recipe.yaml (for --config) and checkpoints/ (for --resume).
"""

# pyright: reportPrivateImportUsage=false
import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: on busy CPUs, threads spinning longer are 10x slower

import timm
import torch
from accelerate.utils import set_seed
from timm.data import resolve_input_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import timm_coda  # noqa: F401  # registers the models
from timm_coda import data, hub
from timm_coda.errors import wrap_errors
from timm_coda.evaluate import TrainingLocalisation
from timm_coda.training import losses, map_penalty, runs, states, trackers
from timm_coda.training.options import HelpFormatter, natural, parse_options, positive, run_options
from timm_coda.training.updates import Updates

DEFAULT_RECIPE = Path(__file__).parent / "hub_configs/coda_net_xs.digits/recipe.yaml"


def make_parser() -> argparse.ArgumentParser:
    """The options. Defaults are the paper's settings for CIFAR-10 (CVPR 2021) where the help gives no other reason."""
    look = {"usage": "python train.py [options]", "description": __doc__, "formatter_class": HelpFormatter}
    parser = argparse.ArgumentParser("train.py", allow_abbrev=False, **look)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("run").add_argument
    add("--config", help="YAML file of options; the command line wins (default without --data, --model: the digits)")
    add("--output", help="output folder (default: a fresh one, runs/NAME, runs/NAME-2, ...)")
    add("--overwrite", action=switch, default=False, help="replace the run that is in the output folder")
    add("--resume", nargs="?", const="auto", help="folder of a run to go on with; auto: --output's, if there is one")
    add("--seed", type=natural, default=0, help="the same seed gives the same weights, with any number of workers")
    add("--mixed-precision", choices=["no", "bf16", "fp16"], help="(default: what accelerate launch says, else no)")
    add("--save-every", type=natural, default=0, help="updates between training states; epochs save one anyway")
    add("--keep", type=natural, default=0, help="models of so many best epochs to keep in best/, too")
    add("--log-every", type=positive, default=10, help="updates between points of the loss curve")
    add("--explain-every", type=natural, default=5, help="epochs between explanation pictures; 0: one at the end")
    add("--explain-images", type=positive, default=8, help="test images in such a picture; 8 fit a page")
    add("--eval-explanations", type=natural, default=0, help="epochs between scores of grid localisation; 0: none")
    add("--push-to-hub", metavar="REPO", help="publish the finished run there, USER/NAME, with a model card")
    add("--report-to", default="none", help="a tracker of Accelerate's: tensorboard, wandb, ...; none: files do")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["digits"], help="digits, a Hub id, parquet files, a folder of these or of images")
    add("--subset", help="configuration of a Hub data set that has several")
    add("--train-split", help="(default: train)")
    add("--test-split", help="(default: validation, or test, whichever there is: Hub tests often have no labels)")
    add("--val-fraction", type=float, default=0.1, help="share to hold out for tests where there is no such split")
    add("--image-column", help="(default: the only one with images)")
    add("--label-column", help="(default: the only one with classes, or the one named label)")
    add("--num-classes", type=positive, help="(default: the data set's)")
    add("--workers", type=natural, default=2, help="processes that decode images; 0 is best for tiny ones")
    buffer = {"type": positive, "nargs": "?", "const": 8192, "metavar": "IMAGES"}
    add("--streaming", **buffer, help="read parquet files as the run goes, shuffled in a buffer (alone: of 8192)")
    add("--data-on-device", action=switch, default=False, help="for small images: decoded once, shifted, flipped there")
    add = parser.add_argument_group("images").add_argument
    add("--img-size", type=positive, help="height and width in pixels (default: the model's)")
    add("--interpolation", help="nearest, bilinear or bicubic (default: the model's)")
    add("--crop-pct", type=float, help="share of its width that a test image keeps (default: the model's)")
    add("--crop-padding", type=natural, default=4, help="shift training images by up to so many pixels")
    add("--scale", type=float, nargs=2, default=[1.0, 1.0], help="area of a random crop; the paper crops by padding")
    add("--ratio", type=float, nargs=2, default=[1.0, 1.0], help="aspect ratio of a random crop; 1 1: as it is")
    add("--hflip", type=float, default=0.5, help="probability of a left-right flip; 0 for letters and digits")
    add("--color-jitter", type=float, default=0.0, help="strength of changed colours; the paper has none")
    add("--auto-augment", help="timm's policy, such as rand-m10-n2, the paper's for ImageNet (default: none)")
    add("--erase", type=float, default=0.0, help="probability of a black rectangle; the paper has none")
    add("--mixup", type=float, default=0.0, help="alpha; 0: off, for a mixed image has no one class to explain")
    add("--cutmix", type=float, default=0.0, help="alpha; 0: off, likewise")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="coda_net_s", help="a name in timm's registry, local-dir:FOLDER or hf-hub:ID")
    add("--model-args", nargs="+", action="extend", default=[], metavar="NAME=JSON", help="as logit_temperature=100")
    add("--pretrained", action=switch, default=False, help="start from the model's published weights")
    add("--head-only", action=switch, default=False, help="freeze all but the classifier: quick, and seldom enough")
    add("--grad-checkpointing", action=switch, default=False, help="compute activations again to save memory")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, which are then tested and saved; 0: none")
    add = parser.add_argument_group("learning").add_argument
    add("--epochs", type=positive, default=200, help="times that each training image is seen")
    add("--batch-size", type=positive, default=16, help="images a step and process; GPUs want more, and more --lr")
    add("--grad-accum", type=positive, default=1, help="steps in an update: a larger batch with the same memory")
    add("--loss", choices=losses.LOSSES, default="bce", help="bce: a yes or no a class; -uniform: B-cos v2's targets")
    add("--map-penalty", type=float, default=0.0, help="times mean |W(x)|, added to the loss; for CoDA-Nets")
    add("--smoothing", type=float, default=0.0, help="of labels; 0 lets evidence grow without limit")
    add("--opt", default="adam", help="an optimiser of timm's")
    add("--lr", type=float, default=2.5e-4, help="highest learning rate; for batches of 16")
    add("--weight-decay", type=float, default=0.0, help="dynamic weights are bounded without it")
    add("--sched", choices=losses.SCHEDULES, default="step", help="a schedule of timm's, stepped each update")
    add("--decay-epochs", type=float, default=30, help="epochs between two decays; step only")
    add("--decay-rate", type=float, default=2 / 3, help="factor of a decay; step only")
    add("--warmup-epochs", type=float, default=0.0, help="of linear warm-up; small batches need none")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end; not for step")
    add("--clip-grad", type=float, default=0.0, help="largest norm of the gradient; 0: none")
    add("--agc", type=float, default=0.0, help="largest gradient of a unit, as a share of its weights; 0: none")
    return parser


def train(args: argparse.Namespace, stop: list[int]) -> None:
    """One run, from top to bottom, or until a signal is in `stop`."""
    output, options = Path(args.output), run_options(args)
    environment = hub.environment()  # now, for at the end the folder may hold other code
    if args.resume and (output / "summary.json").exists():
        raise runs.Stopped(f"{output} is finished: there is nothing to go on with", code=0)
    repo_id = args.push_to_hub and hub.check_access(args.push_to_hub)  # now, and not after hours of training

    def chosen(names: str) -> dict[str, Any]:
        return {name: options[name] for name in names.split()}

    accelerator: Any = runs.make_accelerator(output, **chosen("mixed_precision grad_accum report_to"))
    main, processes, device = accelerator.is_main_process, accelerator.num_processes, accelerator.device
    set_seed(args.seed)

    # Data and model
    names = "subset image_column label_column train_split test_split val_fraction num_classes"
    source = (data.load_stream if args.streaming else data.load_data)(args.data, **chosen(names))
    classes = source.label_names
    network: Any = hub.create_model(args.model, num_classes=len(classes), **chosen("pretrained model_args head_only"))
    with wrap_errors("--grad-checkpointing", states.RunError):
        network.set_grad_checkpointing(args.grad_checkpointing)
    with wrap_errors("--img-size, --interpolation, --crop-pct or a random change of the images", states.RunError):
        config = resolve_input_data_config(network, chosen("img_size interpolation crop_pct"))
        changes = chosen("crop_padding scale ratio hflip color_jitter auto_augment erase")
        transform, test_transform = data.create_transforms(config, **changes)
    how = chosen("batch_size seed workers streaming data_on_device") | {"config": config, "changes": changes}
    place = {"process": accelerator.process_index, "processes": processes, "device": device}
    loader = data.make_train_loader(source.train, transform, **how, **place)
    test_set = data.ImageDataset(source.test, test_transform)
    test_loader = data.create_loader(test_set, **chosen("batch_size workers"))
    examples = test_set.examples(args.explain_images)
    data.check_images(network, examples.images)
    localisation = TrainingLocalisation(test_set, len(classes), every=args.eval_explanations if main else 0)

    # Learning
    batches, images_seen = len(loader), len(source.train)
    if batches == 0:
        raise states.RunError(f"--batch-size {args.batch_size}, {processes} processes: only {images_seen} images")
    with wrap_errors("--opt, --lr, --sched or a number that belongs to them", states.RunError):
        optimizer = create_optimizer_v2(network, **chosen("opt lr weight_decay"))
        schedule = chosen("sched decay_epochs decay_rate warmup_epochs min_lr")
        schedule |= {"num_epochs": args.epochs, "updates_per_epoch": math.ceil(batches / args.grad_accum)}
        scheduler: Any = create_scheduler_v2(optimizer, step_on_epochs=False, **schedule)[0]
    mixing = losses.Mixing(args.mixup, args.cutmix, args.smoothing, len(classes))
    smoothing = 0.0 if mixing.on else args.smoothing  # mixed labels are smooth already
    loss_function, test_loss = losses.make_loss(args.loss, smoothing), losses.make_loss(args.loss, 0.0)
    ema = ModelEmaV3(network.to(device), args.ema, use_warmup=True) if args.ema else None
    with wrap_errors("--map-penalty", states.RunError):
        penalty = map_penalty.MapPenalty(network, args.map_penalty, mixed=mixing.on)
    model, optimizer, test_loader = accelerator.prepare(network, optimizer, test_loader)
    if args.data_on_device:
        test_loader = list(test_loader)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    updates = Updates(accelerator, model, optimizer, norm=args.clip_grad, adaptive=args.agc)
    published: Any = network if ema is None else ema.module

    # Begin, or go on
    trackers.start(accelerator, args.report_to, options)
    progress = states.load_state(accelerator, output / "checkpoints", options) if args.resume else states.Progress()
    if progress.update:
        accelerator.print(f"going on with {output} after update {progress.update}")
    elif main:
        runs.start_folder(output, options)
    silent, parameters = runs.no_pictures(network), sum(weight.numel() for weight in network.parameters())
    where = f"on {processes} x {device.type}; results go to {output}"
    accelerator.print(f"{args.model}, {parameters:,} parameters, {where}")
    about = f"{images_seen} training and {len(test_set)} {source.test.name} images of {len(classes)} classes"
    accelerator.print(about, *(f"note: {note}" for note in (*source.notes, silent) if note), sep="\n")
    window = torch.tensor(progress.window[accelerator.process_index] if progress.window else [0.0] * 3, device=device)
    before = time.perf_counter() - progress.seconds

    def explain(path: Path) -> None:
        """Draw where the evidence for the two likeliest classes of the examples is."""
        if main and not silent:
            explanation = published.eval().explain(examples.images.to(device), top=min(2, len(classes)))
            if runs.save_picture(explanation, path, label_names=classes, true_labels=examples.labels):
                trackers.log_picture(accelerator, path, step=progress.update)

    def save_model(folder: Path) -> None:
        hub.save_model(published, folder, label_names=classes, data_config=config)

    def add_point() -> dict[str, float]:
        means = progress.add_point(*accelerator.reduce(window.clone()).tolist())
        window.zero_()
        trackers.log(accelerator, {**means, "lr": optimizer.param_groups[0]["lr"]}, step=progress.update)
        return means

    def stopping() -> bool:  # all processes or none
        return bool(stop if processes == 1 else accelerator.reduce(torch.tensor(len(stop), device=device)).item())

    def save() -> None:
        progress.window, progress.seconds = accelerator.gather(window[None]).tolist(), time.perf_counter() - before
        progress.check(losses.evaluate(accelerator, network, [examples], test_loss)[0])  # never save spoilt weights
        states.save_state(accelerator, output / "checkpoints", progress, options)
        if stopping():
            trackers.finish(accelerator)
            raise runs.stopped(output, stop)

    while progress.epoch < args.epochs:
        model.train()
        todo, name = loader.from_batch(progress.epoch, progress.batch), f"epoch {progress.epoch + 1}/{args.epochs}"
        bar = runs.progress_bar(todo, name, total=batches, initial=progress.batch, shown=main)
        clock, seen = time.perf_counter(), 0
        for images, labels, skipped in bar:
            progress.batch += 1
            number = (progress.batch - 1) * processes + accelerator.process_index  # of the batch, whoever has it
            set_seed(data.derive_seed(args.seed, progress.epoch, number))
            progress.skip(skipped)
            weight = float(len(labels) > 0)
            if not weight:  # all images are broken; other processes wait for this one, so it learns nothing from others
                images, labels = examples.images.to(device), examples.labels.to(device)
            images, labels, targets = mixing(images, labels)
            with accelerator.accumulate(model):
                logits = model(images)
                loss = (loss_function(logits, targets) + penalty(labels)) * weight
                accelerator.backward(loss)
                made = updates.step()
            window += torch.where(loss.isfinite(), weight * losses.tally(loss, logits, labels), 0)
            seen += len(labels) * processes
            if not accelerator.sync_gradients:
                continue
            progress.add_update(made)
            scheduler.step_update(progress.update)
            if ema is not None and made:
                ema.update(network, step=progress.update)
            if progress.update % args.log_every == 0:
                means, speed = add_point(), seen / (time.perf_counter() - clock)
                bar.set_postfix_str("loss {:.3f} acc {:.3f} {:.0f} img/s".format(*means.values(), speed), refresh=False)
            due = args.save_every > 0 and progress.update % args.save_every == 0
            if progress.batch < batches and (due or stopping()):
                save()

        means, speed = add_point(), seen / (time.perf_counter() - clock)
        loss, accuracy, unread = losses.evaluate(accelerator, published, test_loader, test_loss)
        progress.skip(unread)
        found = localisation.after_epoch(published, progress.epoch + 1)
        trackers.log(accelerator, {"test_loss": loss, "test_accuracy": accuracy, **found}, step=progress.update)
        numbers = {"loss": loss, "accuracy": accuracy, **found, **means, "images_per_second": speed}
        if progress.add_epoch(numbers) and main:
            save_model(output)
        if main:
            states.keep_best(output / "best", progress.history, args.keep, save_model)
        shown = f"loss {means['train_loss']:.4f}, test loss {loss:.4f}, accuracy {accuracy:.4f}, {speed:.0f} img/s"
        shown += "".join(f", {name} {score:.3f}" for name, score in found.items() if score is not None)
        accelerator.print(f"epoch {progress.epoch:3}/{args.epochs}: {shown}")
        if args.explain_every and progress.epoch % args.explain_every == 0:
            explain(output / "explanations" / f"epoch-{progress.epoch:04}.png")
        save()

    if main:
        published = timm.create_model(f"local-dir:{output}", pretrained=True).to(device)  # as anyone loads it
        explain(output / "explanation.png")
        facts = {"options": options, "parameters": parameters, "processes": processes, "label_names": classes}
        facts |= {"environment": environment, **localisation.at_end(published)}
        runs.save_summary(output, progress, facts | {"training_images": images_seen, "test_images": len(test_set)})
        print(runs.closing_words(output, progress, pictures=not silent))
    trackers.finish(accelerator)
    runs.publish(output, repo_id if main else None)


def main() -> int:
    try:
        train(parse_options(make_parser(), sys.argv[1:], DEFAULT_RECIPE), stop=runs.watch_signals())
        return 0
    except (states.RunError, data.DataError, hub.HubError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, (hub.SaveError, states.Diverged)) else 2
    except (runs.Stopped, KeyboardInterrupt) as stopped:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(stopped)
        return getattr(stopped, "code", 130)


if __name__ == "__main__":
    sys.exit(main())
