for (const map of document.querySelectorAll(".map")) {
  const tip = map.querySelector(".tip"), dots = [...map.querySelectorAll("circle")];
  let last = null;
  map.querySelector("svg").addEventListener("pointermove", (event) => {
    const dot = event.target.closest("circle");
    if (dot === last || !dot) return;
    last?.classList.remove("on");
    dot.classList.add("on");
    last = dot;
    tip.textContent = `<a_${dot.dataset.code}> ${dot.dataset.tip}`;
  });
  map.querySelector("select").addEventListener("change", (event) => {
    const code = event.target.value;
    for (const dot of dots) dot.classList.toggle("off", code !== "" && dot.dataset.code !== code);
    const chosen = dots.filter((dot) => dot.dataset.code === code).map((dot) => dot.dataset.tip);
    tip.textContent = code === "" ? "Point at an item to read its title." : chosen.slice(0, 20).join(" · ");
  });
}
