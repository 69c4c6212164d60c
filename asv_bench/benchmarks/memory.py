"""Peak memory: subtract peakmem_inputs, which holds the inputs and what a small call leaves behind."""

from . import inputs


class Memory:
    """Causal attention of 2^18 tokens, d = 8: Q, K, V, dO and each result are 8 MiB."""

    params = (("polynomial",), ("forward", "forward_and_backward"))
    param_names = ("rival", "work")

    def setup(self, rival, work):
        self.run = getattr(inputs, work)(rival, 2**18, 8, True)
        getattr(inputs, work)(rival, 64, 8, True)()

    def peakmem_inputs(self, rival, work):
        pass

    def peakmem_work(self, rival, work):
        self.run()
