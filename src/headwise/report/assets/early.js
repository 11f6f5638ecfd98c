// The theme, before anything is drawn; and what went wrong, for tests and for the curious.
(() => {
  const page = document.documentElement;
  const wanted = /[#&]theme=(light|dark)\b/.exec(location.hash);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  page.dataset.theme = wanted ? wanted[1] : dark ? "dark" : "light";
  page.dataset.errors = "0";
  const failed = (what) => {
    page.dataset.errors = String(Number(page.dataset.errors) + 1);
    page.dataset.error = what;
  };
  addEventListener("error", (event) => failed(event.message));
  addEventListener("unhandledrejection", (event) => failed(String(event.reason)));
  addEventListener("securitypolicyviolation", (event) => failed(`blocked ${event.blockedURI}`));
})();
