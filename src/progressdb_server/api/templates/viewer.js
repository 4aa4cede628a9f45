// Updates the table of jobs each second. Without this script, reload the page to see changes.
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
        document.getElementById("live").textContent = working ? `Unfinished jobs: ${working}. This page updates itself.` : "All jobs are finished.";
      }
    } catch {
      return; // the session has ended or the server is down: keep the last table
    }
    setTimeout(refresh, every);
  };
  setTimeout(refresh, every);
})();
