"""Options of jobs.evaluate: the compared methods, and one of two protocols."""

from pydantic import Field, model_validator

from attrib.common.settings import JobSettings, Positive, Settings, Uri
from attrib.data.settings import TableSettings
from attrib.shares.settings import SharesSettings


class MethodSettings(Settings):
    """A method: an embed run of the sources and one of the queries, with or without trained mappers."""

    name: str = Field(min_length=1)
    sources: Uri  # embeddings
    queries: Uri  # embeddings
    mapper: Uri | None = None  # AbC's linear mappers, .pth, .pt, .ckpt or .safetensors (attrib/evaluate/mappers.py)
    shares: SharesSettings | None = None  # another calibrator to measure, such as that of train.json
    distractors: Uri | None = None  # AbC only: embeddings, or a .npy [n, d]; None: abc.distractors

    @model_validator(mode="after")
    def _distractors_apart(self):
        if self.distractors == self.sources:
            raise ValueError(
                f"distractors and sources are both {self.sources!r}, so exemplars would be distractors too; write the "
                "paths of the distractors alone into a .txt file and set abc.distractors to it"
            )
        if self.distractors and self.distractors.endswith(".txt"):
            raise ValueError(
                f"distractors {self.distractors!r} is a list of source paths; set abc.distractors to it instead"
            )
        return self


class TruthSettings(TableSettings):
    """The truth table: one row per (query, role, source group); key_column names the query."""

    role_column: str = "role"
    group_column: str = "source_group"
    source_group_column: str = "group"  # of the sources' metadata
    query_method_column: str = "method"  # of the queries' metadata: what generated them


class AbcSettings(Settings):
    """AbC's protocol (arXiv 2306.09345): every query against the distractors and its own model's exemplars."""

    test_cases: dict[str, Uri] = Field(min_length=1)  # name: JSON as AbC released it
    exemplar_prefix: str = ""  # in paths of exemplars (and of distractors in a .txt), in front of the sources' keys
    query_prefix: str = ""  # in paths of synthetic images, in front of the queries' keys
    distractors: Uri | None = None  # a .txt with paths of sources; None: every method has its own distractors
    whole_pool: bool = False  # also score with the exemplars of all models in the pool

    @model_validator(mode="after")
    def _list_of_paths(self):
        if self.distractors and not self.distractors.endswith(".txt"):
            raise ValueError(
                f"abc.distractors {self.distractors!r} is not a .txt file with one path of a source per line; for "
                "embeddings or a .npy file, set methods[].distractors instead"
            )
        return self


class MeasureSettings(Settings):
    """Measures of the pairs of a truth table beside ranking (attrib/evaluate/pair_measures.py).

    Not for AbC: the scan of its distractors does not keep the most similar sources that a calibrator of shares needs,
    and a customised model has several exemplars where the theory takes one.
    """

    theory_role: str | None = "content"  # (source image, query) pairs of this role; None: no theory
    # Sources that shares are divided among, as in attribution; None: no shares.
    shares_top_k: int | None = Field(default=10, ge=2)
    num_folds: int = Field(default=5, ge=2)  # of source groups; measured on the fold that was not fitted


class EvaluateSettings(JobSettings):
    """jobs.evaluate: rank the known true sources of generated images by one or several methods."""

    methods: tuple[MethodSettings, ...] = Field(min_length=1)
    truth: TruthSettings | None = None  # exactly one of truth and abc
    abc: AbcSettings | None = None
    measures: MeasureSettings = MeasureSettings()  # truth only
    reference: str | None = None  # the method that others are compared with; None: the first
    output: Uri  # a folder: evaluation.json, table.txt, queries.parquet, comparison.html, theory.svg, shares.svg
    title: str = "Methods compared"
    num_queries_shown: int = Field(default=12, ge=0)  # on the page, where the methods differ most
    thumbnail_px: Positive = 112

    @property
    def reference_name(self) -> str:
        return self.reference or self.methods[0].name

    @model_validator(mode="after")
    def _methods_consistent(self):
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two methods are named {twice[0]!r}; give each its own name")
        if self.reference_name not in names:
            raise ValueError(f"reference {self.reference!r} is not a method; choose one of {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _one_protocol(self):
        if (self.truth is None) == (self.abc is None):
            raise ValueError("give exactly one of truth (a table of true groups) and abc (AbC's test cases)")
        for method in self.methods:
            if self.truth and method.distractors:
                raise ValueError(f"method {method.name!r}: only abc uses distractors; remove them")
            if self.abc and (method.distractors is None) == (self.abc.distractors is None):
                raise ValueError(
                    f"method {method.name!r} needs distractors from exactly one place: abc.distractors (a .txt) or its "
                    "own distractors (embeddings or .npy)"
                )
        return self
