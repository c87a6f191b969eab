"""A network and a clip that take milliseconds, as words of `vidtrain train`."""

TINY_RUN = [
    "model=late_fusion_pool", "model.backbone=small", "clip.num_frames=2", "clip.stride=2",
    "clip.size=32", "data=folder", "data.batch_size=4", "data.workers=0", "optim=adamw_cosine",
    "optim.lr=0.01", "trainer=cpu", "logger=csv",
]  # fmt: skip
