"use strict";
(() => {
  const PAGE = 100;
  const by = (id) => document.getElementById(id);
  const element = (name, text, attributes) => {
    const made = document.createElement(name);
    if (text !== undefined && text !== null) made.textContent = text;
    for (const key in attributes || {}) made.setAttribute(key, attributes[key]);
    return made;
  };
  const number = (value) => value === null || value === undefined ? "\u2013" : String(value).replace("-", "\u2212");
  const share = (value) => value === null ? "\u2013" : number(Number((100 * value).toPrecision(3))) + " %";
  const fold = (text) => text.normalize("NFKD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  const chunks = new Map();
  let index = null;
  let shown = null;

  window.lineamentIndex = (found) => {
    index = found;
    index.place = new Map(index.rows.number.map((n, place) => [n, place]));
    if (by("table")) table(); else feature();
  };
  window.lineamentChunk = (name, found) => {
    chunks.set(name, found);
    if (shown !== null) draw();
  };

  function table() {
    const rows = index.rows;
    const words = rows.number.map((n, i) => fold(n + " " + rows.words[i]));
    const columns = [["number", "feature"], ...Object.entries(index.columns), ["words", "tokens"]];
    const head = document.querySelector("#table thead tr");
    let key = "importance" in index.columns ? "importance" : "density", down = true, page = 0, order = [];
    for (const [name, label] of columns) {
      const cell = element("th", null, {scope: "col"});
      if (name !== "words") cell.className = "number";
      const button = element("button", label, {type: "button"});
      button.addEventListener("click", () => {
        down = key === name ? !down : name !== "number" && name !== "words";
        key = name;
        page = 0;
        sort();
      });
      cell.dataset.key = name;
      cell.append(button);
      head.append(cell);
    }
    const sort = () => {
      const wanted = fold(by("search").value).split(/\s+/).filter(Boolean);
      order = [];
      words.forEach((text, i) => { if (wanted.every((word) => text.includes(word))) order.push(i); });
      const values = rows[key];
      const sign = down ? -1 : 1;
      order.sort((a, b) => {
        const x = values[a], y = values[b];
        if (x === y) return a - b;
        if (x === null) return 1;
        if (y === null) return -1;
        return x < y ? -sign : sign;
      });
      for (const cell of head.children) {
        if (cell.dataset.key === key) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        else cell.removeAttribute("aria-sort");
      }
      fill();
    };
    const fill = () => {
      const body = document.querySelector("#table tbody");
      const made = document.createDocumentFragment();
      for (const i of order.slice(page * PAGE, (page + 1) * PAGE)) {
        const row = element("tr");
        const name = element("th", null, {scope: "row", class: "number"});
        name.append(element("a", rows.number[i], {href: "feature.html#" + rows.number[i]}));
        row.append(name);
        for (const column in index.columns) {
          row.append(element("td", column === "density" ? share(rows[column][i]) : number(rows[column][i]), {class: "number"}));
        }
        row.append(element("td", rows.words[i], {class: "words", dir: "auto"}));
        made.append(row);
      }
      body.replaceChildren(made);
      const pages = Math.max(1, Math.ceil(order.length / PAGE));
      by("tally").textContent = order.length === 1 ? "1 feature" : order.length + " features";
      by("where").textContent = "page " + (page + 1) + " of " + pages;
      by("pages").hidden = pages < 2;
      by("back").disabled = page === 0;
      by("on").disabled = page + 1 >= pages;
    };
    const turn = (step) => { page += step; fill(); by("features").scrollIntoView(); };
    by("back").addEventListener("click", () => turn(-1));
    by("on").addEventListener("click", () => turn(1));
    const form = by("find");
    form.hidden = false;
    form.addEventListener("input", () => { page = 0; sort(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => { page = 0; sort(); }));
    window.addEventListener("pageshow", sort);
    sort();
  }

  function feature() {
    const load = () => {
      const asked = Number(location.hash.slice(1));
      shown = index.place.has(asked) ? asked : index.rows.number[0];
      const chunk = index.chunks[index.place.get(shown)];
      if (chunks.has(chunk)) { draw(); return; }
      const script = document.createElement("script");
      script.src = "data/features-" + String(chunk).padStart(5, "0") + ".js";
      document.body.append(script);
    };
    window.addEventListener("hashchange", load);
    load();
  }

  function draw() {
    const place = index.place.get(shown);
    const found = (chunks.get(index.chunks[place]) || {})[shown];
    if (!found) return;
    document.title = index.title + " \u00b7 feature " + shown;
    by("name").textContent = "Feature " + shown;
    for (const [id, step] of [["before", -1], ["after", 1]]) {
      const other = index.rows.number[place + step];
      by(id).hidden = other === undefined;
      if (other !== undefined) by(id).setAttribute("href", "feature.html#" + other);
    }
    const main = by("feature");
    const facts = element("dl", null, {class: "facts"});
    const say = (name, value) => {
      const pair = element("div");
      pair.append(element("dt", name), element("dd", value));
      facts.append(pair);
    };
    say("On in", share(found.density) + " of activations");
    say("Maximum", number(found.maximum));
    say("Mean where it is on", number(found.mean));
    if (found.importance !== null) say("Importance", number(found.importance));
    if (found.complexity !== null) say("Complexity", number(found.complexity));
    say("KL when turned off", found.effect === null ? "not measured" : number(found.effect) + " nats");
    const parts = [facts];
    if (found.histogram.length) parts.push(section("How large it gets", bars(found)));
    if (found.raises.length || found.lowers.length || found.nearest.length) {
      const lists = element("div", null, {class: "lists"});
      if (found.raises.length) lists.append(list("Raises", found.raises));
      if (found.lowers.length) lists.append(list("Lowers", found.lowers));
      if (found.nearest.length) lists.append(list("Nearest atoms (cosine)", found.nearest, true));
      parts.push(section("What it writes", lists));
    }
    for (const [title, many] of found.groups) if (many.length) parts.push(section(title, examples(many, found.maximum)));
    main.replaceChildren(...parts);
  }

  function section(title, content) {
    const made = element("section");
    made.append(element("h2", title), content);
    return made;
  }

  function list(title, pairs, links) {
    const made = element("div");
    made.append(element("h3", title));
    const items = element("ol");
    for (const [word, value] of pairs) {
      const item = element("li");
      if (links && index.place.has(word)) {
        const link = element("a", "feature " + word, {href: "feature.html#" + word});
        item.append(link);
      } else item.append(element("bdi", links ? "feature " + word : word));
      item.append(element("span", number(value)));
      items.append(item);
    }
    made.append(items);
    return made;
  }

  function bars(found) {
    const NS = "http://www.w3.org/2000/svg";
    const first = found.histogram.findIndex((n) => n > 0);
    let last = found.histogram.length - 1;
    while (last > first && !found.histogram[last]) last -= 1;
    const counts = found.histogram.slice(Math.max(first, 0), last + 1);
    const most = Math.max(1, ...counts);
    const svg = document.createElementNS(NS, "svg");
    const total = counts.reduce((a, b) => a + b, 0);
    // The largest value lies in the last bin, which ends there: bins are even in the logarithm.
    const low = found.edges[Math.max(first, 0)], from = found.edges[last], to = found.edges[last + 1];
    const high = found.maximum > 0 ? found.maximum : to;
    const part = found.maximum > 0 && from > 0 ? Math.min(1, Math.max(0.05, Math.log(high / from) / Math.log(to / from))) : 1;
    const set = (node, values) => { for (const key in values) node.setAttribute(key, values[key]); return node; };
    set(svg, {viewBox: "0 0 640 150", class: "bars", role: "img", width: "100%"});
    svg.setAttribute("aria-label", "Histogram of " + total + " values from " + number(low) + " to " + number(high) + ", on a logarithmic scale");
    const wide = 620 / (counts.length - 1 + part);
    counts.forEach((count, k) => {
      const tall = 115 * count / most;
      const bar = set(document.createElementNS(NS, "rect"), {x: 10 + k * wide, y: 120 - tall, width: Math.max(1, wide * (k + 1 < counts.length ? 1 : part) - 1.5), height: tall});
      svg.append(bar);
    });
    for (const [x, anchor, text] of [[10, "start", number(low)], [630, "end", number(high)]]) {
      const label = set(document.createElementNS(NS, "text"), {x: x, y: 140, "text-anchor": anchor});
      label.textContent = text;
      svg.append(label);
    }
    return svg;
  }

  function examples(many, maximum) {
    const pictures = many.every((each) => each.p);
    const made = element("div", null, pictures ? {class: "crops"} : {});
    for (const each of many) {
      if (each.p) {
        const figure = element("figure");
        figure.append(element("img", null, {src: each.p, alt: "where the feature has the value " + each.v}), element("figcaption", number(each.v)));
        made.append(figure);
        continue;
      }
      const row = element("div", null, {class: "snippet"});
      row.append(element("span", number(each.v), {class: "value"}));
      const text = element("div", null, {dir: "auto"});
      (each.t || []).forEach((token, k) => {
        const value = (each.a || [])[k] || 0;
        const span = element("bdi", null);
        const inner = element("span", token, {class: k === each.c ? "t here" : "t"});
        if (value) {
          const full = Math.round(6 + 30 * Math.min(1, Math.abs(value) / (Math.abs(maximum) || 1)));
          inner.style.background = "color-mix(in srgb, var(--note) " + full + "%, transparent)";
          inner.title = number(value);
        }
        span.append(inner);
        text.append(span);
      });
      row.append(text);
      made.append(row);
    }
    return made;
  }
})();
