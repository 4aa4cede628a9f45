// Keeps the table of jobs up to date while one of them works. Without this script the page is reloaded by hand.
"use strict";
(() => {
  const rows = document.getElementById("jobs");
  if (!rows) return;
  const every = 1000;
  const refresh = async () => {
    try {
      const answer = await fetch("/viewer/jobs?part=rows", { credentials: "same-origin", redirect: "error" });
      if (answer.ok) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        rows.replaceChildren(...page.body.childNodes);
        const working = rows.querySelectorAll("[data-working]").length;
        document.getElementById("live").textContent = working ? `${working} unfinished` : "No job is unfinished.";
      }
    } catch {
      return; // logged out, or the server has gone: leave what is there
    }
    setTimeout(refresh, every);
  };
  setTimeout(refresh, every);
})();
