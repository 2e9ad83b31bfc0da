(() => {
  const form = document.getElementById("filters");
  const entries = [...document.querySelectorAll("[data-entry]")];
  const count = document.getElementById("count");
  const empty = document.getElementById("empty");
  const fold = (text) => text.normalize("NFKD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  const texts = entries.map((entry) => fold(entry.textContent + " " + entry.dataset.words));
  const value = (name) => form.elements.namedItem(name).value;
  const apply = () => {
    const words = fold(value("search")).split(/\s+/).filter(Boolean);
    let shown = 0;
    entries.forEach((entry, index) => {
      const fits = words.every((word) => texts[index].includes(word))
        && ["wing", "status", "year"].every((name) => !value(name) || entry.dataset[name].split(" ").includes(value(name)));
      entry.hidden = !fits;
      shown += fits;
    });
    count.textContent = shown === 1 ? "1 paper" : shown + " papers";
    empty.hidden = shown > 0;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  window.addEventListener("pageshow", apply);
  apply();
})();
