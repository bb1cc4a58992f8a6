"""Runs CPython's own suites and tells each test's result: cpython_runner.py MODULE... | --only TEST...
One JSON line per test: {"test": ID, "result": "ok" | "fail" | "error" | "skip", "detail": ...}."""
import faulthandler, json, os, signal, sys, time, traceback, unittest, warnings

warnings.simplefilter("ignore")
out = os.fdopen(os.dup(1), "w", buffering=1)
# What the tests print is not ours; keep stdout of ours alone.
os.dup2(2, 1)

LIMIT = 60  # seconds for one test
# Where the kernel has a vsock device but no vsock loopback, as under Firecracker, its accept never returns, natively too.
EXCLUDED = ("ThreadedVSOCKSocketStreamTest",)


class Result(unittest.TestResult):
    def startTest(self, test):
        super().startTest(test)
        self.outcome, self.detail, self.began = "ok", "", time.monotonic()
        faulthandler.dump_traceback_later(LIMIT, exit=True)

    def tell(self, test, result, detail=""):
        out.write(json.dumps({"test": test if isinstance(test, str) else test.id(), "result": result, "detail": detail[-1500:],
                              "seconds": round(time.monotonic() - getattr(self, "began", time.monotonic()), 2)}) + "\n")

    def stopTest(self, test):
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        self.tell(test, self.outcome, self.detail)

    def worse(self, outcome, test, error):
        text = error if isinstance(error, str) else "".join(traceback.format_exception(*error))
        if not hasattr(self, "outcome") or isinstance(test, unittest.suite._ErrorHolder):
            # setUpClass, setUpModule
            self.tell(test, outcome, text)
        elif self.outcome in ("ok", "skip") or outcome == "error":
            self.outcome, self.detail = outcome, text

    def addError(self, test, error):
        self.worse("error", test, error)

    def addFailure(self, test, error):
        self.worse("fail", test, error)

    def addSkip(self, test, reason):
        if isinstance(test, unittest.suite._ErrorHolder):
            self.tell(test, "skip", reason)
        else:
            self.outcome, self.detail = "skip", reason
            # A test skipped by its class has no startTest of its own in some versions.

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.worse("fail" if issubclass(error[0], test.failureException) else "error", test, error)

    def addExpectedFailure(self, test, error):
        self.outcome = "expected failure"

    def addUnexpectedSuccess(self, test):
        self.outcome = "unexpected success"


def flatten(suite):
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from flatten(one)
        elif not any(name in one.id() for name in EXCLUDED):
            yield one


import test.support

test.support.verbose = False
loader = unittest.TestLoader()


def run(name, wanted=None):
    # "network" means strangers in the Internet, but to test_socketserver, which only talks to itself.
    test.support.use_resources = RESOURCES + (["network"] if name == "test.test_socketserver" else [])
    try:
        tests = flatten(loader.loadTestsFromName(name))
    except unittest.SkipTest as skip:
        result.tell(name, "skip", str(skip))
        return
    unittest.TestSuite(one for one in tests if wanted is None or one.id() in wanted).run(result)


RESOURCES = ["cpu", "decimal", "subprocess", "walltime"]
names = sys.argv[1:]
result = Result()
if names[0] == "--only":
    for module in sorted({".".join(name.split(".")[:2]) for name in names[1:]}):
        run(module, set(names[1:]))
else:
    for name in names:
        run("test." + name)
out.write(json.dumps({"end": result.testsRun}) + "\n")
out.flush()
# Threads and processes that a test left do not keep us.
os._exit(0)
