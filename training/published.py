"""The published recipes: SpecFormer's masked modelling, and the alignment of frozen encoders of AstroCLIP v1 and v2.

Figures from the papers and their code (Lanusse+2023, arXiv:2310.03024v1; Parker+2024, MNRAS 531, 4990);
`docs/training.md` says where this departs from them.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from astroclip.errors import InputError
from astroclip.losses import info_nce
from astroclip.models import AstroCLIPConfig, AstroCLIPModel
from astroclip.models.configuration import MocoTowerConfig
from astroclip.models.moco_tower import MocoTower
from astroclip.models.specformer_tower import SpecFormerTower, mask_chunks
from training.checkpoints import BestWeights
from training.distributed import joined_mean
from training.loader import Batch
from training.recipes import MaskedSettings, PairSettings, RecipeSettings
from training.run import export_model, run_stage, warmup_cosine
from training.stream import PairStage, open_parts

__all__ = ["FrozenPairs", "MaskedSpecFormer", "build_model", "train_masked", "train_pairs"]

EPSILON = 1e-3  # of the normalisation in the published loss
# Widths for dry runs: every layer and every shape of the input stays, and a step takes a fraction of a second.
TINY: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden": 32, "head_heads": 2, "head_hidden": 32},
    "moco": {"layers": (1, 1, 1, 1), "bottleneck": False, "width": 16, "hidden": 32, "projection": 16},
    "specformer": {"embed_dim": 16, "n_layers": 2, "n_heads": 2, "mlp_ratio": 2, "head_heads": 2, "head_hidden": 32},
}
TINY_WIDTH = 16


class RecipeStage(PairStage):
    """The optimiser and the schedule of the recipes."""

    settings: Any
    model: AstroCLIPModel

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        settings: RecipeSettings = self.settings
        trained = [p for p in self.parameters() if p.requires_grad]
        plain = [] if settings.decay_all else [p for p in trained if p.ndim <= 1]
        kept = {id(p) for p in plain}
        groups = [
            {"params": [p for p in trained if id(p) not in kept], "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=settings.learning_rate, betas=settings.betas
        )
        length = settings.cosine_steps or self.total_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, settings.warmup_steps, length, settings.floor)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout draws from torch's own generator: seeded by the step, a resumed run draws the same."""
        torch.manual_seed(int(torch.randint(2**62, (), generator=self.step_generator())))


class MaskedSpecFormer(RecipeStage):
    """Six runs of fifty tokens are hidden; loss = mean squared error over the numbers that this changed."""

    settings: MaskedSettings

    def __init__(self, settings: MaskedSettings, model: AstroCLIPModel) -> None:
        super().__init__(settings, None, None)  # type: ignore[arg-type]
        self.model = model
        self.model.logit_scale.requires_grad_(False)

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Mean over the joined batch: the number of changed entries differs from process to process."""
        tower: SpecFormerTower = self.model.spectrum_tower
        tokens = tower.tokens(batch["flux"], batch["ivar"])
        masked = mask_chunks(tokens, generator)
        changed = (masked != tokens).float()
        error = (tower.reconstruct(masked).float() - tokens).square()
        return joined_mean((error * changed).sum(), changed.sum())

    def training_step(self, batch: Batch) -> torch.Tensor:
        loss = self.loss(batch, self.step_generator())
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch) -> None:
        loss = self.loss(batch, torch.Generator().manual_seed(0))
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["flux"]))


class FrozenPairs(RecipeStage):
    """InfoNCE between images and spectra; encoders are frozen and in eval mode, heads are trained.

    Frozen encoders run without a graph: no memory for gradients, and no running statistics of BatchNorm that move.
    """

    settings: PairSettings

    def __init__(self, settings: PairSettings, model: AstroCLIPModel) -> None:
        super().__init__(settings, None, None)  # type: ignore[arg-type]
        self.model = model.requires_grad_(False)
        self.model.image_tower.head.requires_grad_(True)
        self.model.spectrum_tower.head.requires_grad_(True)
        self.model.logit_scale.requires_grad_(settings.scale == "learned")
        self.train()  # a new model is in train mode throughout, and Lightning leaves it as it is

    def train(self, mode: bool = True) -> FrozenPairs:
        super().train(mode)
        self.model.eval()
        self.model.image_tower.head.train(mode)
        self.model.spectrum_tower.head.train(mode)
        return self

    def embeddings(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, D) unit vectors of images and spectra; gradients reach the heads."""
        image, spectrum = self.model.image_tower, self.model.spectrum_tower
        with torch.no_grad():
            pixels = batch["images"]
            seen = image.features(pixels) if isinstance(image, MocoTower) else image.tokens(pixels)
            read = spectrum.encode(spectrum.tokens(batch["flux"], batch["ivar"]))
        return _unit(image.head(seen)), _unit(spectrum.head(read))

    def training_step(self, batch: Batch) -> torch.Tensor:
        if self.settings.flips:
            batch = {**batch, "images": _flipped(batch["images"], self.step_generator())}
        image, spectrum = self.embeddings(batch)
        loss = self._contrast(image, spectrum, self.model.scale)
        self.log_dict({"train_loss": loss, "logit_scale": self.model.scale.detach()}, prog_bar=True, sync_dist=True)
        return loss

    def _contrast(self, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if not self.settings.gather:
            return info_nce(a, b, scale)
        first = self.global_rank * len(a)
        return info_nce(a, b, scale, all_a=self.gathered(a), all_b=self.gathered(b), first_row=first)

    def validation_step(self, batch: Batch) -> None:
        """The loss at the learned scale and at 1, and recall@10 within the batch, image -> spectrum."""
        image, spectrum = self.embeddings(batch)
        cosines = image @ spectrum.T
        values = {
            "val_loss": info_nce(image, spectrum, self.model.scale),
            "val_loss_unscaled": info_nce(image, spectrum, 1.0),
            "val_recall_at_10": ((cosines > cosines.diag()[:, None]).sum(1) < 10).float().mean(),
        }
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(image))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors.float(), dim=-1, eps=EPSILON)


def _flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored up-down and left-right with probability a half each."""
    for axis in (2, 3):
        chosen = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        images = torch.where(chosen[:, None, None, None], images.flip(axis), images)
    return images


def build_model(settings: RecipeSettings, image_init: str = "", spectrum_init: str = "") -> AstroCLIPModel:
    """The recipe's model with the encoders of the given model directories; heads from the settings' seed.

    Raises InputError where an encoder is needed and none is given (unless `tiny`), or is of another kind.
    """
    config = AstroCLIPConfig.preset(settings.preset)
    towers: dict[str, Any] = {"image": config.image_tower, "spectrum": config.spectrum_tower}
    sources = {"image": image_init, "spectrum": spectrum_init}
    loaded: dict[str, Any] = {}
    for modality, folder in sources.items():
        kind = type(towers[modality])
        if settings.tiny and towers[modality] is not None:
            towers[modality] = _tiny(towers[modality])
        if folder:
            loaded[modality] = _encoder(folder, modality, kind)
            towers[modality] = _with_head(loaded[modality].config, towers[modality])
    towers = _switched(towers, settings.switches)
    dims = {tower.dim for tower in towers.values() if tower is not None}
    if len(dims) != 1:
        raise InputError(
            f"found heads of {' and '.join(map(str, sorted(dims)))} numbers; wanted the same for images and spectra; "
            "give encoders of one family",
            code="bad_model",
            field="image_init",
        )
    written = {name: {"kind": "none"} if t is None else {"kind": t.KIND, **_values(t)} for name, t in towers.items()}
    torch.manual_seed(settings.seed)
    name = f"{settings.preset}-trained"
    model = AstroCLIPModel(AstroCLIPConfig(**written, projection_dim=dims.pop(), model_name=name))  # type: ignore[arg-type]
    for modality, tower in loaded.items():
        _adopt(model.tower("image" if modality == "image" else "spectrum"), tower, sources[modality])
    return model


def _values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _tiny(config: Any) -> Any:
    head = {"head_width": TINY_WIDTH} if getattr(config, "head_width", 0) else {}
    return replace(config, **TINY[config.KIND], **head)


def _encoder(folder: str, modality: str, kind: type) -> Any:
    """The tower of a model directory."""
    if not (Path(folder) / "config.json").is_file():
        raise InputError(
            f"found no model directory at {folder}; wanted one with a {modality} encoder; make it with `astroclip "
            "weights import`, or by the pretraining stage",
            code="no_model",
            field=f"{modality}_init",
        )
    model = AstroCLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tower = model.image_tower if modality == "image" else model.spectrum_tower
    found = model.config.image_tower if modality == "image" else model.config.spectrum_tower
    if not isinstance(found, kind):
        raise InputError(
            f"found {folder} with {'no ' + modality + ' tower' if found is None else 'a tower of kind ' + found.KIND}; "
            f"wanted kind {kind.KIND}; give the directory of another model",  # type: ignore[attr-defined]
            code="wrong_kind",
            field=f"{modality}_init",
        )
    return tower


def _with_head(found: Any, wanted: Any) -> Any:
    """The encoder as found, with the recipe's head and way of use."""
    if isinstance(found, MocoTowerConfig):
        return replace(found, colours=wanted.colours, output=wanted.output, image_size=wanted.image_size)
    names = ("head_width", "head_heads", "head_hidden")
    return replace(found, **{name: getattr(wanted, name) for name in names})


def _adopt(tower: Any, source: Any, folder: str) -> None:
    """The weights of `source`; a learned-query head starts anew, MoCo's projection comes along."""
    keep_head = isinstance(tower, MocoTower)
    state = {k: v for k, v in source.state_dict().items() if keep_head or not k.startswith("head.")}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    missing = [key for key in missing if keep_head or not key.startswith("head.")]
    if missing or unexpected:
        raise InputError(f"{folder} does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}", code="bad_model")


def _switched(towers: dict[str, Any], switches: tuple[str, ...]) -> dict[str, Any]:
    for entry in switches:
        name, _, value = entry.partition("=")
        modality, _, field = name.strip().partition(".")
        tower = towers.get(modality)
        known = [f"{m}.{s}" for m, t in towers.items() if t is not None for s in t.SWITCHES]
        if tower is None or field not in tower.SWITCHES or (value := value.strip().lower()) not in ("true", "false"):
            raise InputError(
                f"found switch {entry!r}; wanted NAME=true or NAME=false with NAME of {', '.join(known)}",
                code="bad_switch",
                field="switches",
            )
        towers = {**towers, modality: replace(tower, **{field: value == "true"})}
    return towers


def train_masked(settings: MaskedSettings, progress: bool = True) -> Path:
    """Run the stage; the model directory `<out>/model` is written and returned."""
    return _run(masked_stage(settings), progress)


def train_pairs(settings: PairSettings, progress: bool = True) -> Path:
    """Run the stage; the model directory `<out>/model` with the weights of the best validation loss is returned."""
    return _run(pair_stage(settings), progress)


def masked_stage(settings: MaskedSettings) -> MaskedSpecFormer:
    """The stage with its data, ready to be trained."""
    module = MaskedSpecFormer(settings, build_model(settings))
    grid = module.model.config.spectrum_tower.grid
    module.sources = open_parts(settings, grid=grid, columns=("spectrum",))
    return module


def pair_stage(settings: PairSettings) -> FrozenPairs:
    """The stage with its encoders and data, ready to be trained."""
    for name in ("image_init", "spectrum_init"):
        if not getattr(settings, name) and not settings.tiny:
            raise InputError(
                f"found no {name}; wanted the model directory of a trained encoder, since it stays frozen; make it "
                "with `astroclip weights import` or the pretraining stage, or use --tiny to try the configuration",
                code="no_encoder",
                field=name,
            )
    module = FrozenPairs(settings, build_model(settings, settings.image_init, settings.spectrum_init))
    config = module.model.config
    module.sources = open_parts(settings, image_size=config.image_tower.grid.size, grid=config.spectrum_tower.grid)
    return module


def _run(module: MaskedSpecFormer | FrozenPairs, progress: bool) -> Path:
    best = BestWeights(Path(module.settings.out))
    out = run_stage(module, [best], progress)
    best.restore(module)
    return export_model(module.model, out)
