"""The catalogue: the 29 papers of Lineament, what each is for, where it lives and what runs it.

Whether a paper is there is read off the package itself (its home modules and its recipe exist), never kept by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PAPERS", "Paper", "search"]

_PACKAGE = Path(__file__).parent


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class Paper:
    """One entry; ``homes`` are files or folders of the package, ``purpose`` what a user gets from it."""

    slug: str
    title: str
    authors: str
    arxiv: str
    purpose: str
    homes: tuple[str, ...]

    @property
    def year(self) -> int:
        """The year of the first arXiv version, which its number begins with."""
        return 2000 + int(self.arxiv[:2])

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def wing(self) -> str:
        return self.homes[0].split("/")[0]

    @property
    def recipe(self) -> str:
        """The recipe's package, whether it exists or not."""
        return f"recipes/{self.slug.replace('-', '_')}"

    @property
    def there(self) -> bool:
        """Whether every home and the recipe exist in this installation."""
        return all((_PACKAGE / place).exists() for place in (*self.homes, self.recipe))

    @property
    def runs(self) -> str:
        """The command that runs it, or "" while it is not there."""
        return f"lineament reproduce {self.slug}" if self.there else ""

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain data, as ``lineament papers --json`` and the gallery take it."""
        return {
            "slug": self.slug,
            "title": self.title,
            "authors": self.authors,
            "year": self.year,
            "arxiv": self.arxiv,
            "url": self.url,
            "purpose": self.purpose,
            "wing": self.wing,
            "homes": list(self.homes),
            "status": "there" if self.there else "not yet",
            "runs": self.runs,
        }


def search(text: str = "") -> list[Paper]:
    """The papers in which every word of ``text`` occurs (in any field, upper or lower case), newest first.

    >>> [paper.slug for paper in search("saliency revisiting")]
    ['normgrad']
    >>> len(search())
    29
    """
    words = text.casefold().split()

    def matches(paper: Paper) -> bool:
        whole = " ".join(str(value) for value in paper.to_dict().values()).casefold()
        return all(word in whole for word in words)

    return sorted(filter(matches, PAPERS), key=lambda paper: paper.arxiv, reverse=True)


PAPERS: tuple[Paper, ...] = (
    Paper(
        "normgrad",
        "There and Back Again: Revisiting Backpropagation Saliency Methods",
        "Rebuffi, Fong, Ji, Vedaldi",
        "2004.02866",
        "See which parts of an image a network's gradients point at, with one function for the whole Grad-CAM family.",
        ("explain/saliency",),
    ),
    Paper(
        "diffroar",
        "Do Input Gradients Highlight Discriminative Features?",
        "Shah, Jain, Netrapalli",
        "2102.12781",
        "Test whether input gradients mark the pixels that matter, by retraining on what they keep.",
        (
            "explain/faithfulness",
            "data/blockmnist.py",
        ),
    ),
    Paper(
        "reagent",
        "ReAGent: A Model-agnostic Feature Attribution Method for Generative Language Models",
        "Zhao, Shan",
        "2402.00794",
        "Find the context tokens behind a generated token from probabilities alone, without gradients.",
        ("explain/tokens",),
    ),
    Paper(
        "relp",
        "RelP: Faithful and Efficient Circuit Discovery in Language Models via Relevance Patching",
        "Rezaei Jafari, Eberle, Khakzar, Nanda",
        "2508.21258",
        "Locate the components that carry a behaviour of a language model in two forward passes and one backward pass.",
        (
            "explain/patching",
            "explain/relevance",
        ),
    ),
    Paper(
        "gsae",
        "Features that Make a Difference: Leveraging Gradients for Improved Dictionary Learning",
        "Olmo, Wilson, Forsey, Hepner, Howe, Wingate",
        "2411.10397",
        "Train sparse autoencoders whose features are the ones that change the model's output.",
        ("dictionaries",),
    ),
    Paper(
        "vinfo-complexity",
        "Understanding Visual Feature Reliance through the Lens of Complexity",
        "Fel, Bethune, Lampinen, Serre, Hermann",
        "2407.06076",
        "Score how hard each feature of a network is to read out of its layers, and how much the network relies on it.",
        ("measure/complexity",),
    ),
    Paper(
        "convergent-learning",
        "Convergent Learning: Do different neural networks learn the same representations?",
        "Li, Yosinski, Clune, Lipson, Hopcroft",
        "1511.07543",
        "Match the units of separately trained networks, to tell what every training run finds from what one run made up.",
        ("measure/alignment",),
    ),
    Paper(
        "representation-bias",
        "Learned feature representations are biased by complexity, learning order, position, and more",
        "Lampinen, Chan, Hermann",
        "2405.05847",
        "Measure how much of a representation's variance each feature takes, which is not how much the network needs it.",
        ("measure/bias",),
    ),
    Paper(
        "ifm",
        "Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its Interpretation "
        "Using Category Theory",
        "Chen, Zhou, Yan",
        "2310.06756",
        "Count the distinct channels of each layer, and merge the redundant ones without any data.",
        ("measure/merging", "core/surgery"),
    ),
    Paper(
        "neural-collapse",
        "Perturbation Analysis of Neural Collapse",
        "Tirer, Huang, Niles-Weed",
        "2210.16658",
        "Measure how far the features of each layer have collapsed to one point per class, and predict what is left near it.",
        ("measure/collapse",),
    ),
    Paper(
        "shortcut-learning",
        "On the Foundations of Shortcut Learning",
        "Hermann, Mobahi, Fel, Mozer",
        "2310.16228",
        "Measure how much a network prefers the feature that is easy to extract over the one that predicts best.",
        ("measure/shortcuts",),
    ),
    Paper(
        "loss-landscape",
        "Investigating generalization capabilities of neural networks by means of loss landscapes and Hessian analysis",
        "Gabdullin",
        "2412.10146",
        "Draw the loss around trained weights along any axes, and sum up its Hessian's spectrum in two numbers.",
        ("measure/landscape",),
    ),
    Paper(
        "projection-head",
        "Investigating the Benefits of Projection Head for Representation Learning",
        "Xue, Gan, Ni, Joshi, Mirzasoleiman",
        "2403.11391",
        "Decide whether to train with a projection head and drop it, or to reweight features with a fixed one.",
        ("learn/projection",),
    ),
    Paper(
        "useful",
        "Changing the Training Data Distribution to Reduce Simplicity Bias Improves In-distribution Generalization",
        "Nguyen, Haddad, Gan, Mirzasoleiman",
        "2404.17768",
        "Find the examples a network learns late and show them twice, for better accuracy on the same data.",
        (
            "learn/useful",
            "optim/sam.py",
        ),
    ),
    Paper(
        "tract",
        "TrAct: Making First-layer Pre-Activations Trainable",
        "Petersen, Borgelt, Ermon",
        "2410.23970",
        "Train a vision model in fewer epochs by stepping on its first layer's outputs.",
        ("learn/tract",),
    ),
    Paper(
        "diffgrad",
        "diffGrad: An Optimization Method for Convolutional Neural Networks",
        "Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri",
        "1909.11015",
        "Train with an Adam that slows each weight down where its gradient stands still.",
        ("optim/diffgrad.py",),
    ),
    Paper(
        "gns",
        "Gradient-Normalized Smoothness for Optimization with Approximate Hessians",
        "Semenov, Jaggi, Doikov",
        "2506.13710",
        "Minimise a smooth function with approximate Hessians and no step size to tune.",
        ("optim/gns",),
    ),
    Paper(
        "gbnn",
        "Sequential Training of Neural Networks with Gradient Boosting",
        "Emami, Martinez-Munoz",
        "1909.12098",
        "Grow a network a few units at a time, so that its last units can be switched off when time is short.",
        ("learn/boosting",),
    ),
    Paper(
        "elasticface",
        "ElasticFace: Elastic Margin Loss for Deep Face Recognition",
        "Boutros, Damer, Kirchbuchner, Kuijper",
        "2109.09416",
        "Train embeddings for open-set recognition with margins drawn anew for each sample.",
        ("losses/margins.py", "losses/class_head.py", "losses/fused.py", "measure/embeddings"),
    ),
    Paper(
        "unpg",
        "UNPG: Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition",
        "Jung, Lee, Oh, Park, Park, Son",
        "2203.11593",
        "Add the hard negative pairs inside a batch to any margin loss, for fewer false accepts.",
        ("losses/unpg.py", "losses/pair_losses.py"),
    ),
    Paper(
        "contrastive-ft",
        "Improving Contrastive Learning by Visualizing Feature Transformation",
        "Zhu, Zhao, Liu, Sun, Chen",
        "2108.02982",
        "Watch a contrastive training through its scores, and make its positives harder and its negatives fresher.",
        ("losses/feature_transform.py", "losses/info_nce.py", "losses/queue.py"),
    ),
    Paper(
        "unified-embedding",
        "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems",
        "Coleman, Kang, Fahrbach, Wang, Hong, Chi, Cheng",
        "2305.12102",
        "Hold all categorical features in one shared table instead of one table each.",
        ("modules/unified_embedding",),
    ),
    Paper(
        "ssa",
        "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space",
        "Shen, Lu, Gui, Li, He, Yin, Sun",
        "2511.20102",
        "Train one language model that runs with full attention or with any sparse budget.",
        ("modules/sparse_attention",),
    ),
    Paper(
        "colormnet",
        "ColorMNet: A Memory-based Deep Spatial-Temporal Feature Propagation Network for Video Colorization",
        "Yang, Dong, Tang, Pan",
        "2404.06251",
        "Colour a grey video from one coloured example picture, steadily over many frames.",
        ("modules/colormnet",),
    ),
    Paper(
        "modhifi",
        "ModHiFi: Identifying High Fidelity predictive components for Model Modification",
        "Kashyap, Murti, Nayak, Narshana, Bhattacharyya",
        "2511.19566",
        "Prune a network or make it forget a class from forward passes alone, without its training data.",
        ("edit/pruning.py",),
    ),
    Paper(
        "dcc",
        "Dataset Condensation with Contrastive Signals",
        "Lee, Chun, Jung, Yun, Yoon",
        "2202.02916",
        "Replace a training set by a few learned pictures per class.",
        ("learn/condensation", "audit/condense.py"),
    ),
    Paper(
        "gifd",
        "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization",
        "Fang, Chen, Wang, Wang, Xia",
        "2308.04699",
        "Audit how much of a private batch can be rebuilt from the gradient that a client shares.",
        ("privacy", "audit/leak.py"),
    ),
    Paper(
        "wide-deep-kernels",
        "Wide and Deep Neural Networks Achieve Optimality for Classification",
        "Radhakrishnan, Belkin, Uhler",
        "2204.14126",
        "Classify with infinitely wide and deep networks, and choose the activation that makes them consistent.",
        ("kernels",),
    ),
    Paper(
        "bangla-digits",
        "A Classical Approach to Handcrafted Feature Extraction Techniques for Bangla Handwritten Digit Recognition",
        "Wahid, Shahriar, Sobuj",
        "2201.10102",
        "Recognise glyphs with HOG, LBP or Gabor features and a classical classifier, as a baseline that needs no GPU.",
        ("handcrafted",),
    ),
)
